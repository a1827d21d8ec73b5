"""Event files as other tools write them."""

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def write_scalars(folder: Path, rows: dict[int, dict[str, float]]) -> None:
    """{step: {tag: value}} as an event file in `folder`."""
    writer = EventFileWriter(str(folder))
    for step, values in rows.items():
        summary = Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()])
        writer.add_event(Event(step=step, wall_time=1.0, summary=summary))
    writer.close()
