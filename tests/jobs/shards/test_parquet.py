"""Opening Parquet: what would end the process is told from the footer."""

import base64

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.storage.bucket import ObjectStorage
from rsr.jobs.storage.open import open_storage


class KeysInTheOpen(pe.KmsClient):
    """Wraps a key by writing it down."""

    def __init__(self, _configuration):
        super().__init__()

    def wrap_key(self, key, _master_key):
        return base64.b64encode(key)

    def unwrap_key(self, wrapped, _master_key):
        return base64.b64decode(wrapped)


def write_encrypted(path, *, plaintext_footer):
    properties = pe.CryptoFactory(KeysInTheOpen).file_encryption_properties(
        pe.KmsConnectionConfig(),
        pe.EncryptionConfiguration(
            footer_key="footer",
            column_keys={"column": ["response"]},
            plaintext_footer=plaintext_footer,
        ),
    )
    table = pa.table({"prompt": ["q"] * 5, "response": ["a"] * 5})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("plaintext_footer", "message"),
    [(True, "has encrypted columns"), (False, "cannot be read as Parquet: .*encrypted")],
)
def test_encrypted_parquet_is_refused_in_one_line(
    tmp_path, tiny_student, plaintext_footer, message
):
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"prompt": ["q"], "response": ["a"]}), source / "a.parquet")
    write_encrypted(source / "b.parquet", plaintext_footer=plaintext_footer)
    with pytest.raises(UsageError, match=rf"b\.parquet {message}"):
        open_parquet(source / "b.parquet")
    result = CliRunner().invoke(
        main, ["score", str(source), str(tmp_path / "out"), "--model", str(tiny_student)]
    )
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_footer_on_an_object_store_is_asked_for_once(s3_url, monkeypatch):
    storage = open_storage(s3_url)
    with storage.writing("a.parquet") as temporary:
        pq.write_table(pa.table({"text": ["x" * 1000] * 100}), temporary, compression="none")
    asked = []
    read_range = ObjectStorage.read_range

    def counted(self, name, start, num_bytes):
        asked.append(num_bytes)
        return read_range(self, name, start, num_bytes)

    monkeypatch.setattr(ObjectStorage, "read_range", counted)
    with open_parquet(f"{s3_url}/a.parquet") as file:
        assert len(asked) == 1
        assert file.read()["text"].to_pylist() == ["x" * 1000] * 100
