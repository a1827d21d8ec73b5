"""Work on a GPU, recorded once and launched as one thing from then on."""

from collections.abc import Callable

import torch


def recorded(work: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The work as a graph; it is not done yet. What goes wrong leaves nothing behind but a RuntimeError."""
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[stream.device_index]
    random_state = generator.get_state()
    try:
        # A capture that breaks off would else leave its stream the current one.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            # Threads of the monitor may ask the driver what they like meanwhile.
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            work()
    except RuntimeError:
        # And the generator waiting for the capture to end: it gets a state that does not.
        fresh = torch.Generator(stream.device)
        fresh.set_state(random_state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph
