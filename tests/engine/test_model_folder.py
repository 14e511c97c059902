"""What a model is called, by its hub name or by where it lies."""

from rsr.engine.model_folder import told_model


def test_a_hub_name_is_told_as_it_stands():
    assert told_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_checkpoints_of_two_runs_are_told_apart(tmp_path, monkeypatch):
    for run in ("first", "second"):
        (tmp_path / run / "checkpoint-500").mkdir(parents=True)
        assert told_model(f"{tmp_path}/{run}/checkpoint-500/") == f"{run}/checkpoint-500"
    monkeypatch.chdir(tmp_path / "first")
    assert told_model("checkpoint-500") == "first/checkpoint-500"


def test_a_folder_of_the_hubs_cache_is_told_by_the_hub_name(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    assert told_model(str(folder)) == "Qwen/Qwen3-8B"
