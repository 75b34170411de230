"""What a node has to say: an output, a part of the history, and a text on the node itself."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

log = logging.getLogger("svdquant-nodes")


def reported(*outputs: object, text: str, event: str = "") -> io.NodeOutput:
    """The outputs of a node that shows `text`, and writes `event`, if there is one, to the log.

    The page draws a node's `ui` text for ComfyUI's own preview nodes alone; on any other it draws what is sent while
    the node runs. Without a page, called from Python, there is nobody to send it to.
    """
    if event:
        log.info("SVDQuant: %s", event)
    running = get_executing_context()
    if running is not None:
        # The host's file, which only a running host has loaded.
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, running.node_id)
    return io.NodeOutput(*outputs, ui=ui.PreviewText(text))
