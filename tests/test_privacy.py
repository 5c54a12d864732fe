"""What engine/README.md says may leave the house holds no name of a patient, file or folder."""

import io
import shutil
import zipfile
from pathlib import Path

from sslus.engine.shard import Settings, shard
from sslus.ssl import methods
from sslus.ssl.evaluate import evaluate
from sslus.ssl.table import write_features
from sslus.ssl.train import Settings as Training
from sslus.ssl.train import train

NAMES = (b"doe-jane", b"MRN-4711", b"videos-of")
PRIVATE = ("shards/doe-jane/local/", "run/config.json")


def contents(path: Path) -> list[bytes]:
    """The bytes of a file, and those of the files in it if it is a zip (NumPy's and PyTorch's)."""
    found = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(io.BytesIO(found[0])) as z:
            found += [z.read(name) for name in z.namelist()]
    return found


def test_what_may_be_shared_names_nobody(clips, tmp_path):
    videos = tmp_path / "videos-of-the-clinic"
    shutil.copytree(clips, videos)
    labels = videos / "labels.csv"
    header, *rows = labels.read_text().splitlines()
    for i, row in enumerate(rows):
        name, label, patient = row.split(",")
        (videos / name).rename(videos / f"{name}-doe-jane.mp4")
        rows[i] = f"{name}-doe-jane.mp4,{label},MRN-4711-{patient}"
    labels.write_text("\n".join([header, *rows]) + "\n")
    shards, run = tmp_path / "shards" / "doe-jane", tmp_path / "run"
    shard([videos], shards, Settings(size=32, stride=2), labels=labels, device="cpu", jobs=1)
    values, config = methods.recipe("autoencoder", "default")
    small = {"backbone": "test_efficientnet", "max_steps": 2, "batch_size": 4, "image_size": 32}
    train(shards, Training(method="autoencoder", **values | small), config, run)
    evaluate(run, labels, percents=(100,), num_seeds=1)
    write_features(run)

    files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(videos)]
    told = {
        path.relative_to(tmp_path).as_posix()
        for path in files
        if any(name in content for content in contents(path) for name in NAMES)
    }
    assert {"run/backbone.safetensors", "run/evaluation/predictions.csv", "run/features.csv",
            "run/checkpoint.pt", "shards/doe-jane/shard-000000.tar",
            "shards/doe-jane/store/index.npz"} <= {
        path.relative_to(tmp_path).as_posix() for path in files
    }  # fmt: skip
    # Where the names are, so that the search is known to find them.
    local = shards.relative_to(tmp_path) / "local"
    assert {f"{local}/ledger.jsonl", f"{local}/request.json", "run/config.json"} <= told
    assert not [name for name in told if not name.startswith(PRIVATE)]
