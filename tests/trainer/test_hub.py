"""Model cards and pushing, with the hub's client replaced: nothing leaves the machine."""

import pytest
import yaml
from unipic2.core.errors import InputError
from unipic2.trainer import FlowGRPOConfig, hub
from unipic2.trainer.pretrain import main, parse, pretrain


@pytest.fixture
def uploads(monkeypatch):
    """Return what the hub's client was asked to do."""
    calls = []

    class Client:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, name, **options):
            calls.append(("create", name))
            return type("Address", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Client)
    monkeypatch.setattr("transformers.trainer.hf_api", Client)
    return calls


@pytest.fixture
def argv(make_small_pipeline, pairs_file, tmp_path):
    make_small_pipeline().save_pretrained(tmp_path / "model")
    argv = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(pairs_file), "--use_cpu"]
    argv += ["--output_dir", str(tmp_path / "mine"), *"--resolution 64 --preview_steps 0 --disable_tqdm true".split()]
    return [*argv, *"--max_steps 2 --per_device_train_batch_size 2 --report_to none --save_steps 1".split()]


def head_of(export):
    text = (export / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_every_export_has_a_card(argv, tmp_path):
    head, text = head_of(pretrain(*parse(argv)))
    assert head["library_name"] == "diffusers" and "base_model" not in head
    assert "# mine\n" in text and "for 2 steps on data.jsonl" in text and "| edit_ratio | 0.5 |" in text
    assert str(tmp_path) not in text, "no folder of this machine"
    _, lora = head_of(pretrain(*parse([*argv, "--use_peft", "--output_dir", str(tmp_path / "lora")])))
    assert lora.count("comfyui_lora.safetensors") == 1


def test_a_card_names_the_repository_it_started_from(argv):
    args = parse(argv)[1]
    text = hub.model_card("x", "Skywork/UniPic2-SD3.5M-Kontext-2B", ["someone/data"], args, 7, lora=False)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "Skywork/UniPic2-SD3.5M-Kontext-2B"
    assert "7 steps on someone/data" in text


def test_a_card_has_the_settings_of_its_estimator_and_no_bundled_base(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "nft_beta": 1.0, "num_generations": 2}
    args = FlowGRPOConfig(**settings)
    text = hub.model_card("x", "micro-pretrained", ["micro"], args, 7, lora=False)
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert (
        "| lr_scheduler_type | linear |" in text
        and "| old_policy | average |" in text
        and "| nft_beta | 1.0 |" in text
    )
    assert "| eta |" not in text and "| awm_power |" not in text


def test_a_card_shows_what_differs_between_stages(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "num_generations": 2}
    first, last = (FlowGRPOConfig(**settings, edit_ratio=ratio) for ratio in (0.75, 0.45))
    text = hub.model_card("x", "micro-pretrained", ["micro"], last, 7, lora=False, earlier=[first])
    assert "| edit_ratio | 0.75, then 0.45 |" in text and "| nft_beta | 0.1 |" in text


def test_the_export_alone_is_pushed(argv, uploads, capsys):
    main([*argv, "--push_to_hub", "true", "--hub_token", "secret"])
    assert ("create", "mine") in uploads and ("token", "secret") in uploads
    (pushed,) = [call for call in uploads if call[0] == "upload"]
    assert pushed[1] == "someone/mine" and {"README.md", "transformer", "model_index.json"} <= set(pushed[2])
    assert capsys.readouterr().out.endswith("https://hub/someone/mine\n")


def test_the_last_stage_alone_is_pushed(argv, uploads, tmp_path):
    config = tmp_path / "stages.yaml"
    config.write_text("push_to_hub: true\nstages:\n  - {max_steps: 1}\n  - {max_steps: 2}\n")
    keep = [flag for i, flag in enumerate(argv) if "--max_steps" not in argv[max(i - 1, 0) : i + 1]]
    main(["--config", str(config), *keep])
    assert [call[:2] for call in uploads if call[0] == "upload"] == [("upload", "someone/mine")]
    head, text = head_of(tmp_path / "mine/export")
    assert "# mine\n" in text and "for 3 steps on data.jsonl" in text


def test_an_export_that_the_hub_refused_is_pushed_by_the_same_command(argv, uploads, tmp_path, monkeypatch, capsys):
    config = tmp_path / "stages.yaml"
    config.write_text("push_to_hub: true\nresume: true\nstages:\n  - {max_steps: 1}\n  - {max_steps: 2}\n")
    keep = [flag for i, flag in enumerate(argv) if "--max_steps" not in argv[max(i - 1, 0) : i + 1]]
    upload = hub.HfApi.upload_folder
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(InputError, match="push_to_hub to mine: .*The export is whole, in .*hf upload mine"):
        main(["--config", str(config), *keep])
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    main(["--config", str(config), *keep])
    assert capsys.readouterr().out.endswith("https://hub/someone/mine\n")


def test_a_hub_that_cannot_be_reached_is_known_before_training(argv, monkeypatch, tmp_path):
    """The real client, at an address where nobody answers."""
    endpoint = hub.HfApi(endpoint="http://127.0.0.1:9", token="secret")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: endpoint)
    with pytest.raises(InputError, match="push_to_hub to mine: found .*hf auth login"):
        pretrain(*parse([*argv, "--push_to_hub", "true"]))
    assert not (tmp_path / "mine/export").exists()
