"""A thin slice of `benchmarks.tamper`: every kind of file and of damage is drawn now and then."""

from __future__ import annotations

from benchmarks import tamper


def test_nothing_that_was_tampered_with_is_read_in_silence(capfd):
    code = tamper.main(["--places", "1", "--share", "0.15", "--seed", "2"])
    said = capfd.readouterr().out
    figures = dict(line.split("=") for line in said.splitlines()[-5:])
    assert code == 0, said
    assert int(figures["tried"]) >= 12
    assert (figures["loaded_silently"], figures["tracebacks"], figures["code_executed"]) == ("0", "0", "0")
