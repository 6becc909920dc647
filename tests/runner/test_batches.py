from __future__ import annotations

from mitigate.runner.batches import generate_arguments, plan_batches
from tests.runner.fake_world import FakeBenchmark, resolved


def test_batches_are_cut_from_the_full_list_and_never_mix_tasks_or_limits() -> None:
    benchmark = FakeBenchmark(limit=5)
    batches = plan_batches(benchmark, benchmark.samples(), 4, 12)
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert [len(batch.samples) for batch in batches] == [4, 1, 4, 4, 4, 3]
    for batch in batches:
        assert {(sample.task, batch.max_new_tokens) for sample in batch.samples} in ({("caption", 12)}, {("yes_no", 2)})
    ids = [sample.id for batch in batches for sample in batch.samples]
    assert sorted(ids) == sorted(sample.id for sample in benchmark.samples())


def test_a_samples_own_limit_only_lowers_the_configured_one() -> None:
    benchmark = FakeBenchmark(limit=1)
    limits = {
        batch.samples[0].task: batch.max_new_tokens for batch in plan_batches(benchmark, benchmark.samples(), 4, 1)
    }
    assert limits == {"caption": 1, "yes_no": 1}


def test_missing_samples_of_a_batch() -> None:
    benchmark = FakeBenchmark(limit=2)
    batch = plan_batches(benchmark, benchmark.samples(), 4, 12)[0]
    assert [sample.id for sample in batch.missing({"img-0/caption"})] == ["img-1/caption"]


def test_arguments_of_generate_leave_out_what_does_not_apply() -> None:
    greedy = generate_arguments(resolved().config["decoding"])
    assert greedy == {"do_sample": False, "num_beams": 1}
    sampling = generate_arguments(
        resolved(decoding__do_sample=True, decoding__repetition_penalty=1.2).config["decoding"]
    )
    assert sampling == {
        "do_sample": True,
        "num_beams": 1,
        "repetition_penalty": 1.2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
