"""What an event may hold besides numbers: text, histograms, pictures, hyper-parameters, chart layout.

Every function takes plain values and returns one `Summary.Value` or a part of one. They may be slow (PNG)
and run in the logger's thread.
"""

import io
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_SCALAR,
    HistogramProto,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from finetuning.common import text as common_text

LAYOUT_TAG = layout_metadata.CONFIG_SUMMARY_TAG
EXPERIMENT_TAG = hparams_metadata.EXPERIMENT_TAG
SESSION_START_TAG = hparams_metadata.SESSION_START_INFO_TAG
SESSION_END_TAG = hparams_metadata.SESSION_END_INFO_TAG


def scalar_metadata(description: str) -> SummaryMetadata:
    """Description of a scalar tag. Without the data class the fast data server drops it."""
    metadata = SummaryMetadata(summary_description=description, data_class=DATA_CLASS_SCALAR)
    metadata.plugin_data.plugin_name = "scalars"
    return metadata


def string_tensor(data: bytes) -> TensorProto:
    """A tensor of rank 1 with one string, as the text and custom scalars plugins read it."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    return TensorProto(dtype=DT_STRING, string_val=[data], tensor_shape=shape)


def text_value(tag: str, text: str) -> Summary.Value:
    """Markdown for the TEXT tab: controls removed, secrets replaced, otherwise as given."""
    safe = common_text.redact(str(text))
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=tag, metadata=metadata, tensor=string_tensor(safe.encode()))


# --- histograms ------------------------------------------------------------------------------


def histogram_value(
    tag: str,
    counts: Sequence[float],
    edges: Sequence[float],
    total: float | None = None,
    total_squares: float | None = None,
) -> Summary.Value:
    """Histogram from `n` counts and `n + 1` rising bin edges.

    `total` and `total_squares` are the sums of x and x² of the data; estimated from the bin centres
    if not given. No chart shows them.
    """
    counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or not len(counts):
        raise ValueError(f"got {counts.shape} counts and {edges.shape} edges, need n and n + 1")
    used = np.flatnonzero(counts)
    if len(used):  # the chart stretches to the outermost edges, empty or not
        counts, edges = counts[used[0] : used[-1] + 1], edges[used[0] : used[-1] + 2]
    centres = (edges[1:] + edges[:-1]) / 2
    if total is None:
        total = float(counts @ centres)
    if total_squares is None:
        total_squares = float(counts @ centres**2)
    histogram = HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=total,
        sum_squares=total_squares,
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
    return Summary.Value(tag=tag, histo=histogram)


_NARROW = 1e-3  # half the width of equal values, relative: a wider one would stretch the chart


def tensor_counts(values: Any, bins: int) -> tuple[list[float], np.ndarray, float, float]:
    """Counts, edges, sum and sum of squares of a torch tensor, computed on its device.

    Only small results leave the device. Non-finite elements are left out.
    """
    import torch

    values = values.detach().reshape(-1)
    if not values.dtype.is_floating_point or values.dtype.itemsize < 4:
        values = values.float()
    low, high = torch.stack(torch.aminmax(values)).tolist() if values.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        return tensor_counts(values[torch.isfinite(values)], bins)
    if low == high:
        low, high = low - _NARROW * max(1e-3, abs(low)), high + _NARROW * max(1e-3, abs(low))
    counts = torch.histc(values, bins, low, high)
    total = values.sum(dtype=torch.float64)
    squares = torch.linalg.vector_norm(values, dtype=torch.float64) ** 2
    *counts, total, squares = torch.cat([counts.double(), total[None], squares[None]]).tolist()
    return counts, np.linspace(low, high, bins + 1), total, squares


# --- pictures ----------------------------------------------------------------------------------


def _image(tag: str, png: bytes, width: int, height: int, channels: int) -> Summary.Value:
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    return Summary.Value(tag=tag, image=image)


def image_value(tag: str, image: np.ndarray, dataformats: str) -> Summary.Value:
    """PNG of an array laid out as `dataformats` says (CHW, HWC, HW); floats are 0 to 1, integers 0 to 255."""
    from PIL import Image

    order = dataformats.upper()
    if sorted(order) not in (["H", "W"], ["C", "H", "W"]) or len(order) != image.ndim:
        raise ValueError(f"image of shape {image.shape} does not fit dataformats={dataformats!r}")
    image = image.transpose([order.index(axis) for axis in "HWC" if axis in order])
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype == bool or np.issubdtype(image.dtype, np.floating):
        image = np.nan_to_num(image.astype(np.float32)) * 255
    pixels = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    return _image(tag, buffer.getvalue(), pixels.shape[1], pixels.shape[0], channels)


def figure_value(tag: str, figure: Any) -> Summary.Value:
    """PNG of a matplotlib figure, or of what a function makes, drawn without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure() if callable(figure) else figure)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return _image(tag, buffer.getvalue(), *canvas.get_width_height(), 4)


# --- HPARAMS -----------------------------------------------------------------------------------


def _hparams_value(tag: str, **content: Any) -> Summary.Value:
    data = plugin_data_pb2.HParamsPluginData(**content)
    metadata = hparams_metadata.create_summary_metadata(data)
    return Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)


def _plain(name: str, value: Any) -> bool | float | str:
    """A hyper-parameter as HPARAMS can hold it; anything but booleans and numbers becomes text."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return common_text.clean(str(common_text.redact_values(value, name)), limit=500)


# Settings that stand first in the table, as those do of which TensorBoard knows that runs differ in them.
FIRST_HPARAMS = ("learning_rate", "lora_r", "max_seq_length", "batch_size", "num_epochs")


def experiment_value(hparams: Mapping[str, Any], metric_tags: Sequence[str]) -> Summary.Value:
    """The columns of the HPARAMS table. One run's list counts for the whole table: keep it constant."""
    types = {bool: api_pb2.DATA_TYPE_BOOL, float: api_pb2.DATA_TYPE_FLOAT64}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name,
                type=types.get(type(_plain(name, value)), api_pb2.DATA_TYPE_STRING),
                differs=name in FIRST_HPARAMS,
            )
            for name, value in hparams.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metric_tags],
    )
    return _hparams_value(EXPERIMENT_TAG, experiment=experiment)


def session_start_value(
    hparams: Mapping[str, Any], start_time: float, trial: str = ""
) -> Summary.Value:
    """This run's row of the HPARAMS table. trial: its name there, of no other run; empty: the run's."""
    info = plugin_data_pb2.SessionStartInfo(start_time_secs=start_time, group_name=trial)
    for name, value in hparams.items():
        plain = _plain(name, value)
        if isinstance(plain, bool):
            info.hparams[name].bool_value = plain
        elif isinstance(plain, float):
            info.hparams[name].number_value = plain
        else:
            info.hparams[name].string_value = plain
    return _hparams_value(SESSION_START_TAG, session_start_info=info)


def session_end_value(status: str, end_time: float) -> Summary.Value:
    """End of this run, `status` "success" or "failure". The first one written can't be changed."""
    code = {"success": api_pb2.STATUS_SUCCESS, "failure": api_pb2.STATUS_FAILURE}[status]
    info = plugin_data_pb2.SessionEndInfo(status=code, end_time_secs=end_time)
    return _hparams_value(SESSION_END_TAG, session_end_info=info)


# --- CUSTOM SCALARS ------------------------------------------------------------------------------


def layout_value(layout: Mapping[str, Mapping[str, Sequence[str]]]) -> Summary.Value:
    """The CUSTOM SCALARS tab: {category: {chart: [regular expression of tags, ...]}}."""
    categories = [
        layout_pb2.Category(
            title=category,
            chart=[
                layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ],
        )
        for category, charts in layout.items()
    ]
    data = layout_pb2.Layout(category=categories).SerializeToString()
    metadata = layout_metadata.create_summary_metadata()
    tensor = TensorProto(dtype=DT_STRING, string_val=[data], tensor_shape=TensorShapeProto())
    return Summary.Value(tag=LAYOUT_TAG, metadata=metadata, tensor=tensor)
