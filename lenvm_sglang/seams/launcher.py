"""Hooks of the launcher: flags, every reason not to start, middleware and endpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lenvm_sglang import settings, versions
from lenvm_sglang.metrics import request_metrics
from lenvm_sglang.scope import ThinkTags
from lenvm_sglang.seams.front_end import chat_prompt
from lenvm_sglang.seams.this_process import SeamError, process, verify
from lenvm_sglang.settings import Settings, StartError


def add_cli_args(result: None, parser: Any) -> None:
    """AFTER ServerArgs.add_cli_args: our flags."""
    settings.add_flags(parser)


def from_cli_args(result: Any, cls: type, args: Any) -> None:
    """AFTER ServerArgs.from_cli_args: our settings ride on the result."""
    process.command_line = True
    try:
        ours = settings.settings_from(vars(args))
        if ours is not None:
            verify()
    except (StartError, SeamError) as error:
        raise SystemExit(f"lenvm: {error}") from None
    settings.attach(result, ours)


def launch_subprocesses(original: Callable[..., Any], cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Engine._launch_subprocesses: every reason not to start, before anything is spawned."""
    process.settings = settings.settings_of(server_args)
    if process.settings is not None:
        try:
            verify()
            check_start(server_args, process.settings)
        except (StartError, SeamError) as error:
            if process.command_line:
                raise SystemExit(f"lenvm: {error}") from None
            raise
    started = original(cls, server_args, *args, **kwargs)
    for part in started:
        for info in getattr(part, "scheduler_infos", None) or ():
            if (ours := info.get("lenvm")) is not None:
                process.longest = ours["max_request_tokens"]
                process.sees_images = ours["images"]
                process.think_tags = ours["think_tags"] and ThinkTags(*ours["think_tags"])
    return started


def check_start(server_args: Any, ours: Settings) -> None:
    """Refuse a start with unsupported settings or an unfit checkpoint.

    Raises:
        StartError: saying why.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.environ import envs

    from lenvm_sglang.model import check_architecture, check_vision
    from lenvm_sglang.worker import architecture_of

    server_args.resolve_once()
    resolved = resolving_view(server_args)
    settings.refuse_settings(resolved, versions.host().refusals)
    if envs.SGLANG_RUST_SERVER.get():
        raise StartError("--lenvm-model does not work with SGLANG_RUST_SERVER yet; unset it.")
    base = ModelConfig.from_server_args(server_args)
    tokenizer = resolved.tokenizer_path or resolved.model_path
    if base.is_multimodal and settings.looks_ahead(ours):
        raise StartError("a lookahead head is served beside text models only; serve one, or a LenVM without it.")
    if settings.is_attached(ours):
        settings.refuse_adapters(resolved)
        settings.check_attached(ours, tokenizer, resolved.model_path)
        return
    settings.check_checkpoint(ours, tokenizer, base.context_len)
    architecture = architecture_of(ours.model)
    check_architecture(architecture)
    check_vision(ours.model, architecture, base.hf_config, base.is_multimodal)


def setup_http(original: Callable[..., Any], server_args: Any, tokenizer_manager: Any, template_manager: Any,
               port_args: Any, scheduler_infos: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """AROUND http_server._setup_and_run_http_server: middleware and endpoints."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.runtime_context import get_observability
    from starlette.middleware import Middleware

    from lenvm_sglang import endpoints, openapi
    from lenvm_sglang.middleware import LengthFieldsMiddleware

    info = scheduler_infos[0].get("lenvm")
    if process.served and info is None:
        raise SystemExit("lenvm: the scheduler came up without the length value model; its log says why.")
    context_length = tokenizer_manager.model_config.context_len
    # innermost: after the host has authenticated the request and decompressed its body
    http_server.app.user_middleware.append(
        Middleware(
            LengthFieldsMiddleware,
            served=process.served,
            context_length=context_length,
            thinks=process.think_tags is not None,
            sees_images=process.sees_images,
        )
    )
    if process.served:
        openapi.extend(http_server.app)
        if get_observability().enable_metrics:
            process.metrics = request_metrics()
    host = endpoints.Host(
        app=http_server.app,
        tokenizer_manager=tokenizer_manager,
        chat_prompt=chat_prompt,
        vocabulary=tokenizer_manager.model_config.vocab_size,
        context_length=context_length,
    )
    endpoints.mount(host, info)
    return original(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, *args, **kwargs)


def build_server_args(**kwargs: Any) -> Any:
    """`Engine.server_args_class`, the host's own place for overriding: also takes lenvm_model and its options."""
    from sglang.srt.server_args import ServerArgs

    names = ("lenvm_model", *(f"lenvm_{option}" for option in settings.OPTIONS))
    ours = settings.settings_from({name: kwargs.pop(name, None) for name in names})
    server_args = ServerArgs(**kwargs)
    settings.attach(server_args, ours)
    return server_args
