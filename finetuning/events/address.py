"""The address at which TensorBoard opens with the charts that matter pinned on top."""

import json
from urllib.parse import quote

# Of every run, and never a flat line: one that exists later only appears by itself.
PINNED = (
    "Training/Loss",
    "Eval/Loss",
    "Thinking/Loss",
    "Answer/Loss",
    "Training/Token_Accuracy",
    "Training/Gradient_Norm",
)
SERVER = "http://localhost:6006"  # where `tensorboard` listens without options


def pinned_address(server: str = SERVER) -> str:
    """URL of the TIME SERIES tab with `PINNED` on top and no smoothing, as TensorBoard itself writes it.

    Whether outliers lie outside a chart's frame is no part of an address (as of TensorBoard 2.21): the guide
    says where it is switched.
    """
    cards = [{"plugin": "scalars", "tag": tag} for tag in PINNED]
    pinned = quote(json.dumps(cards, separators=(",", ":")), safe=":,/")
    return f"{server}/?pinnedCards={pinned}&smoothing=0#timeseries"
