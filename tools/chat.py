"""A page to chat with a model: an exported directory, or an OpenAI-compatible server.

``chat.py EXPORT`` answers in this process and shows which experts every token took.  ``chat.py
http://HOST:PORT/v1`` asks a server.  Needs gradio: pip install 'moiie-megatron[chat]'.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.program import run_program
from moiie_megatron.utils.errors import UserError


def main() -> None:
    arguments = parse_arguments()
    for name in ("port", "max_new_tokens", "max_pictures", "max_megabytes", "max_characters"):
        check_range(arguments, name, 1)
    serve(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="EXPORT|URL", help="exported directory, or a server's URL")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="(7860)")
    export = parser.add_argument_group("exports")
    export.add_argument("--device", default="auto", help="auto (default), cpu, cuda ...")
    export.add_argument("--dtype", default="auto", help="auto (default: of the files), float32 ...")
    export.add_argument("--expert", metavar="NAME", help="this expert alone, as shared.0")
    server = parser.add_argument_group("servers", "(key: $OPENAI_API_KEY)")
    server.add_argument("--model", dest="served", metavar="NAME", help="its name at the server")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    limits.add_argument("--max-pictures", type=int, default=4, metavar="N", help="each talk (4)")
    limits.add_argument("--max-megabytes", type=int, default=20, metavar="N", help="a file (20)")
    limits.add_argument(
        "--max-characters", type=int, default=8000, metavar="N", help="a message (8000)"
    )
    return parser.parse_args()


def serve(arguments: argparse.Namespace) -> None:
    """Build the page and serve it until the program is stopped.

    Raises:
        UserError: The model cannot be used, gradio is missing, or the address is in use.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"The page needs gradio ({error}): pip install 'moiie-megatron[chat]'."
        ) from error
    from moiie_megatron.chat.limits import Limits

    limits = Limits(
        megabytes=arguments.max_megabytes,
        pictures=arguments.max_pictures,
        characters=arguments.max_characters,
        new_tokens=arguments.max_new_tokens,
    )
    is_server = arguments.model.startswith(("http://", "https://"))
    page = server_page(arguments, limits) if is_server else export_page(arguments, limits)
    launch(page, arguments, show_error=is_server)


def server_page(arguments: argparse.Namespace, limits: Any) -> Any:
    """The page over a server, which answers."""
    from moiie_megatron.chat.server_page import build_server_page
    from moiie_megatron.evaluation.benchmarks.target import find_server

    if arguments.expert is not None:
        raise UserError(
            f"--expert is {arguments.expert} and {arguments.model} is a server, which uses all "
            "experts: name an export."
        )
    url, key = arguments.model.rstrip("/"), os.environ.get("OPENAI_API_KEY", "none")
    served = find_server(url, arguments.served, key)
    return build_server_page(url, served, key, limits, served)


def export_page(arguments: argparse.Namespace, limits: Any) -> Any:
    """The page for an export in this process."""
    from moiie_megatron.chat.conversation import Chat
    from moiie_megatron.chat.page import build_page
    from moiie_megatron.exported.model import ExportedModel

    if arguments.served is not None:
        raise UserError(f"--model is {arguments.served} and {arguments.model} is no URL.")
    model = ExportedModel.load(
        arguments.model, device=arguments.device, dtype=arguments.dtype, expert=arguments.expert
    )
    alone = f", {arguments.expert} alone" if arguments.expert else ""
    return build_page(Chat(model, limits), Path(arguments.model).resolve().name + alone)


def launch(page: Any, arguments: argparse.Namespace, show_error: bool) -> None:
    """Serve until SIGINT or SIGTERM."""
    from moiie_megatron.chat.page import STYLE, theme

    try:
        page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=False,
            show_error=show_error,
            max_file_size=arguments.max_megabytes * 10**6,
            state_session_capacity=64,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=STYLE,
        )
    except OSError as error:
        raise UserError(
            f"{arguments.host}:{arguments.port} cannot be listened at ({error}): name another "
            "--port or --host."
        ) from error


if __name__ == "__main__":
    run_program(main)
