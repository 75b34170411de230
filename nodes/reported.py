"""What a node has to say: an output, a part of the history, and a text on the node itself."""

from __future__ import annotations

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context


def reported(*outputs: object, text: str) -> io.NodeOutput:
    """The outputs of a node that shows `text`.

    The page draws a node's `ui` text for ComfyUI's own preview nodes alone; on any other it draws what is sent while
    the node runs. Without a page, called from Python, there is nobody to send it to.
    """
    running = get_executing_context()
    if running is not None:
        from server import PromptServer  # the host's file; a test without a server has none to import

        PromptServer.instance.send_progress_text(text, running.node_id)
    return io.NodeOutput(*outputs, ui=ui.PreviewText(text))
