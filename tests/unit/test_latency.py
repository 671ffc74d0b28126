"""Models timed beside each other."""

from ftkit import latency


def test_sides_take_turns_and_the_first_ones_are_not_counted(monkeypatch):
    clock, called = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        def call(turn):
            called.append((turn, name))
            clock[0] += 100 if turn < latency.WARM_UP else seconds[turn - latency.WARM_UP]

        return call

    assert latency.in_turns({"own": side("own", [1, 2, 9]), "other": side("other", [8, 4, 4])}, 3) == {"own": 2, "other": 4}
    assert called == [(turn, name) for turn in range(latency.WARM_UP + 3) for name in ("own", "other")]
