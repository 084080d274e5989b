"""What finished trainings of length value models say side by side: Figures 3, 5 and 6 of the paper."""
