"""Endpoints of our own: `GET /lenvm/info`, `POST /lenvm/predict`."""

from __future__ import annotations

from typing import Any


def mount(app: Any, tokenizer_manager: Any, info: dict[str, Any] | None) -> None:
    """Add the endpoints to the host's application; without a LenVM nothing is added."""
    if info is None:
        return

    async def lenvm_info() -> dict[str, Any]:
        return info

    app.add_api_route("/lenvm/info", lenvm_info, methods=["GET"])
