"""Size and forecast follow measured speed and amount of work; a resumed run keeps its size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.model.packaged import pretrained
from llava.quickstart import forecast, machine, run
from llava.quickstart.forecast import SIZES, Size, choose_size, stage_seconds, with_size
from llava.quickstart.machine import Machine
from llava.quickstart.settings import AUTO, GIVEN, QuickstartSettings, parse_settings
from llava.quickstart.stages import STAGES
from llava.quickstart.work import LanguageShape, TowerShape, drawn, language_shape, rows_in, rows_of, tower_shape
from llava.utils.files import CACHE_VARIABLE
from tests.support.tiny import write_tiny_lm, write_tiny_tower, write_tiny_vqa

FAST, SLOW = Machine("cuda", 1, 300.0, 2000.0), Machine("cpu", 2, 20.0, 2.0)
UNFITTED = QuickstartSettings(Path("o"), size=AUTO)


def total(settings: QuickstartSettings, speed: Machine, **shapes: LanguageShape | TowerShape) -> float:
    language, tower = shapes.get("language", LanguageShape()), shapes.get("tower", TowerShape())
    assert isinstance(language, LanguageShape) and isinstance(tower, TowerShape)
    return sum(stage_seconds(settings, speed, language, tower, rows_of(settings)).values())


def test_the_faster_precision_decides_the_rate() -> None:
    assert FAST.uses_bfloat16 and FAST.rate == 2000e9
    assert not SLOW.uses_bfloat16 and SLOW.rate == 20e9
    assert not Machine("cpu", 1, 100.0, 120.0).uses_bfloat16


def test_a_slow_machine_gets_a_smaller_size_with_a_reason() -> None:
    large, why_large = choose_size(UNFITTED, FAST, LanguageShape(), TowerShape())
    small, why_small = choose_size(UNFITTED, SLOW, LanguageShape(), TowerShape())
    assert (large.size, large.num_train) == ("full", 480) and (small.size, small.num_train) == ("small", 240)
    assert "it fits" in why_large and "none fits" in why_small and "medium (360 drawings)" in why_small
    # The proof does not get smaller: as many unseen drawings.
    assert large.num_test == small.num_test >= 50
    middle, why_middle = choose_size(UNFITTED, Machine("cpu", 2, 150.0, 2.0), LanguageShape(), TowerShape())
    assert middle.size == "medium" and "it fits into 11.0 min" in why_middle
    assert total(small, SLOW) < total(replace(small, size=GIVEN, num_train=480), SLOW)


def test_sizes_have_as_many_steps() -> None:
    steps = {size.num_train // size.captions_per_step for size in SIZES}
    assert steps == {60} and len({size.num_train / size.questions_per_step for size in SIZES}) == 1


def test_what_the_user_gives_is_never_changed() -> None:
    parsed, _ = parse_settings(["--num-train", "600"])
    sized, reason = choose_size(parsed, SLOW, LanguageShape(), TowerShape())
    assert sized == parsed and sized.num_train == 600 and "--num-train 600" in reason
    unfitted, _ = parse_settings(["--num-test", "70"])
    sized, _ = choose_size(unfitted, SLOW, LanguageShape(), TowerShape())
    assert unfitted.size == AUTO and sized.num_test == 70 and sized.num_train == 240


def test_the_forecast_scales_with_speed_and_work() -> None:
    settings = replace(UNFITTED, size=GIVEN)
    first = stage_seconds(settings, SLOW, LanguageShape(), TowerShape(), rows_of(settings))
    faster, fastest = (
        stage_seconds(settings, replace(SLOW, float32=rate), LanguageShape(), TowerShape(), rows_of(settings))
        for rate in (40.0, 80.0)
    )
    for name in ("before", "align", "tune", "after"):  # only the seconds of matrix products shrink
        assert first[name] - faster[name] == pytest.approx(2 * (faster[name] - fastest[name]))
        assert fastest[name] > forecast.FIXED_SECONDS[name]
    assert list(first) == list(STAGES) and faster["data"] == first["data"]
    assert total(settings, SLOW, language=replace(LanguageShape(), layers=60)) > 1.8 * total(settings, SLOW)
    assert total(settings, SLOW, tower=TowerShape(tokens=256)) > 1.5 * total(settings, SLOW)
    assert total(replace(settings, epochs=2.0), SLOW) > total(settings, SLOW)
    assert rows_of(replace(settings, epochs=2.0)).questions == 2 * drawn(480, 64).questions


def test_built_in_shapes_are_those_of_the_parts() -> None:
    # SmolLM2-135M: 134.5 million weights, the tied head counted once; norms are not counted.
    assert LanguageShape().blocks + LanguageShape().head == pytest.approx(134.5e6, rel=0.001)
    assert tower_shape(None, 112) == TowerShape(tokens=64)


def test_models_and_rows_of_the_user_are_counted(tmp_path: Path) -> None:
    write_tiny_lm(tmp_path / "lm")
    write_tiny_tower(tmp_path / "tower")
    write_tiny_vqa(tmp_path / "data", 4, 3)
    (tmp_path / "data" / "test.json").write_text((tmp_path / "data" / "train.json").read_text())
    language, tower = language_shape(str(tmp_path / "lm")), tower_shape(str(tmp_path / "tower"), 112)
    assert language is not None and (language.hidden, language.layers) == (32, 2)
    assert tower is not None and tower.tokens == 4
    rows = rows_in(tmp_path / "data")
    assert (rows.drawings, rows.train_images, rows.questions, rows.test_images) == (0, 4, 12, 4)
    assert rows.question_tokens > rows.answer_tokens > 0
    settings = QuickstartSettings(tmp_path / "o", data=tmp_path / "data", lm=str(tmp_path / "lm"))
    assert "--data" in choose_size(settings, SLOW, language, tower)[1]


def test_a_part_that_is_not_here_is_named(tmp_path: Path) -> None:
    settings = replace(UNFITTED, out=tmp_path, lm=str(tmp_path / "absent"))
    sized, outlook = forecast.new_plan(settings)
    assert outlook.seconds == {} and "absent" in outlook.reason and sized.size == SIZES[-1].name
    assert "forecast" not in run.opening(replace(outlook, reason=""))


def test_parts_in_the_cache_take_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_machine", lambda *_: SLOW)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert forecast.new_plan(UNFITTED)[1].seconds["parts"] == forecast.FIXED_SECONDS["parts"] > 0
    for source, name in (
        (pretrained.SMOLLM2, pretrained.LANGUAGE_NAME),
        (pretrained.DINOV2_SMALL, pretrained.tower_name(UNFITTED.image_size)),
    ):
        pretrained.converted_folder(source, name).mkdir()
    assert forecast.new_plan(UNFITTED)[1].seconds["parts"] == 0.0


def test_a_resumed_run_keeps_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(UNFITTED, out=tmp_path / "run")
    monkeypatch.setattr(machine, "measure_machine", lambda *_: SLOW)
    begun, outlook = forecast.planned(settings, restart=False)
    run.claim_folder(begun, restart=False)
    outlook.write(begun.out)
    monkeypatch.setattr(machine, "measure_machine", lambda *_: FAST)
    resumed, again = forecast.planned(settings, restart=False)
    assert resumed == begun and resumed.size == "small" and again == outlook
    run.claim_folder(resumed, restart=False)
    restarted, _ = forecast.planned(settings, restart=True)
    assert restarted.size == "full"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize("with_plan", [True, False])
def test_a_given_number_that_equals_that_of_the_run_resumes_it(
    tmp_path: Path, size: Size, with_plan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = with_size(replace(UNFITTED, out=tmp_path / "run"), size)
    monkeypatch.setattr(machine, "measure_machine", lambda *_: FAST)
    run.claim_folder(begun, restart=False)
    if with_plan:
        forecast.new_plan(begun)[1].write(begun.out)
    given = QuickstartSettings(tmp_path / "run", num_train=size.num_train)
    assert given.size == GIVEN
    resumed, _ = forecast.planned(given, restart=False)
    assert resumed == begun
    run.claim_folder(resumed, restart=False)
    other, _ = forecast.planned(replace(given, num_train=size.num_train + 1), restart=False)
    with pytest.raises(ConfigError, match=r"other .*num_train"):
        run.claim_folder(other, restart=False)


def test_measured_rates_are_numbers() -> None:
    measured = machine.measure_machine([(64, 64), (64, 128)], {})
    assert measured.float32 > 0 and measured.threads >= 1 and "GFLOP/s" in str(measured)


def test_physical_cores_heed_siblings_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert machine.physical_cores(tmp_path) == 4
    for cpu in range(4):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert machine.physical_cores(tmp_path) == 2
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "fs/cgroup/cpu.max").write_text("100000 100000\n")
    assert machine.physical_cores(tmp_path) == 1
    (tmp_path / "fs/cgroup/cpu.max").write_text("max 100000\n")
    assert machine.physical_cores(tmp_path) == 2


def test_threads_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(machine.torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    machine.use_physical_cores()
    assert chosen == []
    for name in machine.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    machine.use_physical_cores()
    assert chosen == [machine.physical_cores()]


def test_the_table_compares_stages_that_have_both() -> None:
    titles = {"one": "first", "two": "second"}
    rows = forecast.time_table({"one": 60.0, "two": 120.0}, {"one": 90.0}, titles)
    assert rows == [["first", "60 s", "90 s"], ["second", "120 s", "-"], ["together", "1.0 min", "1.5 min"]]
    assert forecast.time_table({"one": 60.0, "two": 120.0}, {}, titles)[-1] == ["together", "3.0 min", "-"]
    assert forecast.time_table({}, {"one": 90.0}, titles)[0] == ["first", "-", "90 s"]
    assert "90 s" in forecast.text_table(rows, ["", "forecast", "measured"])
