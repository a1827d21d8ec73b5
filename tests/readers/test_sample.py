"""One sample: its identity depends on its content alone."""

from finetuning.readers.sample import Sample


def test_id_depends_on_content_alone():
    sample = Sample("q", "t", "a", source="x", line=3, difficulty=2)
    assert sample.id == Sample("q", "t", "a").id
    assert len(sample.id) == 16
    for other in (
        Sample("q", "t", "b"),
        Sample("q", "ta", ""),
        Sample("q", "t", "a", system="s"),
        Sample("q", "t", "a", history=({"role": "user", "content": "x"},)),
        Sample("q", "t", "a", tool_turns=({"role": "user", "content": "x"},)),
    ):
        assert other.id != sample.id
