"""The house: environments, stand-ins, wheel, test runner."""
