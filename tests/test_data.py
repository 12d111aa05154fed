import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sam_ds.data.embedded as embedded
from sam_ds.data.base_model import train_tokenizer
from sam_ds.data.batches import batch_indices, pack
from sam_ds.data.corpus import load_corpus
from sam_ds.data.partition import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    partition_clients,
)
from sam_ds.data.splits import Splits, build_corpus
from sam_ds.errors import InputError

SPLITS = ("public", "train", "valid", "test")


def toy(**sizes):
    """A corpus of numbered train documents, with a quarter as many valid ones."""
    return build_corpus("toy", {name: Splits(
        public=(), train=tuple(f"{name} {i}" for i in range(size)),
        valid=tuple(f"{name} valid {i}" for i in range(size // 4)), test=(f"{name} test",))
        for name, size in sizes.items()})


def write(folder, domain, **splits):
    (folder / domain).mkdir(parents=True)
    for split, texts in splits.items():
        lines = "".join(json.dumps({"text": text, "id": "x"}) + "\n" for text in texts)
        (folder / domain / f"{split}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for domain in ("medical", "legal"):
        write(tmp_path, domain, train=[f"{domain} {i}" for i in range(10)], valid=["v"], test=["t", "u"])
    return tmp_path


# --- corpora ---------------------------------------------------------------------------------------------

def test_every_fourth_train_document_is_public(folder):
    corpus = load_corpus(str(folder))
    legal = corpus.domains["legal"]
    assert list(corpus.domains) == ["legal", "medical"]
    assert legal.public == ("legal 0", "legal 4", "legal 8")
    assert legal.train == tuple(f"legal {i}" for i in (1, 2, 3, 5, 6, 7, 9))
    assert (legal.valid, legal.test) == (("v",), ("t", "u"))
    assert corpus.public == legal.public + corpus.domains["medical"].public


def test_forgetting_domain_is_public_as_a_whole(folder):
    corpus = load_corpus(str(folder), public_every=0, forgetting=("medical",))
    assert corpus.domains["medical"].public == tuple(f"medical {i}" for i in range(10))
    assert corpus.domains["medical"].train == ()
    assert corpus.domains["legal"].public == ()
    mixed = load_corpus(str(folder), forgetting=("medical",)).domains["medical"]
    assert sorted(mixed.public) == sorted(f"medical {i}" for i in range(10)) and mixed.train == ()


def test_fingerprint_sees_texts_names_and_splits():
    base = Splits(public=("a",), train=("b", "c"), valid=(), test=("d",))
    prints = {build_corpus("x", {name: splits}).fingerprint for name, splits in [
        ("k", base),
        ("l", base),
        ("k", Splits(public=("a",), train=("c", "b"), valid=(), test=("d",))),
        ("k", Splits(public=("a",), train=("b",), valid=("c",), test=("d",))),
        ("k", Splits(public=("a",), train=("bc",), valid=(), test=("d",))),
        ("k", Splits(public=("a", "b"), train=("c",), valid=(), test=("d",)))]}
    assert len(prints) == 6 and all(len(each) == 16 for each in prints)
    two = build_corpus("x", {"k": base, "j": base}), build_corpus("y", {"j": base, "k": base})
    assert two[0].fingerprint == two[1].fingerprint


def test_every_file_format_gives_the_same_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i},\nof two lines: ä" for i in range(5)]
    write(tmp_path, "a", train=texts, valid=texts[:1], test=texts[:2])
    write(tmp_path, "b", train=texts, valid=texts[:1], test=texts[:2])
    for split in ("train", "valid", "test"):
        file = tmp_path / "b" / f"{split}.jsonl"
        file.rename(file.with_suffix(".json"))
        kept = {"train": texts, "valid": texts[:1], "test": texts[:2]}[split]
        for domain in "cd":
            (tmp_path / domain).mkdir(exist_ok=True)
        (tmp_path / "c" / f"{split}.txt").write_text("\n\n\n".join(kept) + "\n", encoding="utf-8")
        parquet.write_table(pyarrow.table({"id": list(range(len(kept))), "text": kept}),
                            tmp_path / "d" / f"{split}.parquet")
    domains = load_corpus(str(tmp_path)).domains
    assert len(domains) == 4 and all(splits == domains["a"] for splits in domains.values())


def test_missing_valid_is_cut_from_train(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    write(tmp_path, "a", train=texts, test=["t"])
    splits = load_corpus(str(tmp_path), public_every=0).domains["a"]
    assert 5 <= len(splits.valid) <= 40
    assert sorted(splits.train + splits.valid) == sorted(texts)


@pytest.mark.parametrize("broken, message", [
    ('{"text": "a"}\n{"text": ', r"train\.jsonl, line 2 is not JSON"),
    ('{"text": "a"}\n\n{"body": "b"}\n', r'train\.jsonl, line 3 must be an object with a string'),
    ('{"text": 3}\n', "line 1 must be an object"),
    ('{"text": "  "}\n', "has no text"),
    ("", "has no text"),
])
def test_a_broken_file_is_named_with_its_line(folder, broken, message):
    (folder / "legal" / "train.jsonl").write_text(broken, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_corpus(str(folder))


def test_a_folder_that_is_no_corpus_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_corpus(str(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(InputError, match="did you mean 'medical'"):
        load_corpus(str(folder), forgetting=("medicine",))
    with pytest.raises(InputError, match="public_every"):
        load_corpus(str(folder), public_every=-1)
    (folder / "legal" / "train.txt").write_text("another", encoding="utf-8")
    with pytest.raises(InputError, match=r"several files for train: .*train\.jsonl, train\.txt"):
        load_corpus(str(folder))
    (folder / "legal" / "train.txt").unlink()
    (folder / "legal" / "test.jsonl").unlink()
    with pytest.raises(InputError, match="'legal' .* has no test documents"):
        load_corpus(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no domain"):
        load_corpus(str(tmp_path / "empty"))


def hub(monkeypatch, **splits):
    """`datasets.load_dataset` answers with these tables; returns the arguments it was called with."""
    import datasets

    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        return {name: datasets.Dataset.from_dict(table) for name, table in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_data_set_gives_one_domain_named_after_it(monkeypatch):
    calls = hub(monkeypatch, train={"text": ["a", "", "b"]}, validation={"text": ["c"]}, test={"text": ["d"]})
    corpus = load_corpus("someone/wiki:raw-v1", public_every=2)
    assert calls == [("someone/wiki", "raw-v1")]
    assert corpus.domains == {"wiki": Splits(public=("a",), train=("b",), valid=("c",), test=("d",))}


def test_a_data_set_is_parted_by_its_domain_column_and_cut_by_hash(monkeypatch):
    texts = [f"text {i}" for i in range(300)]
    hub(monkeypatch, train={"text": texts, "domain": ["odd" if i % 2 else "even" for i in range(300)]})
    corpus = load_corpus("mixed", public_every=0)
    assert list(corpus.domains) == ["even", "odd"]
    for rest, splits in enumerate(corpus.domains.values()):
        assert sorted(splits.train + splits.valid + splits.test) == sorted(texts[rest::2])
        assert all(5 <= len(part) <= 30 for part in (splits.valid, splits.test))


def test_an_unknown_data_set_says_what_was_tried(monkeypatch):
    import datasets

    def load_dataset(*arguments):
        raise ConnectionError("no way out")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"no such folder, and .*\('a/b', 'c'\) failed: no way out"):
        load_corpus("a/b:c")
    hub(monkeypatch, train={"body": ["x"]})
    with pytest.raises(InputError, match='no column "text"; its columns: body'):
        load_corpus("a")


# --- the embedded corpus ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def installed():
    return load_corpus("embedded")


def test_embedded_corpus_is_four_domains_in_their_proportions(installed):
    assert list(installed.domains) == ["code", "legal", "product", "technical"]
    for name, splits in installed.domains.items():
        sizes = np.array([sum(map(len, getattr(splits, split))) for split in SPLITS])
        assert 150_000 < sizes.sum() <= embedded.DOMAIN_CHARS, name
        assert np.abs(sizes / sizes.sum() - [0.3, 0.5, 0.1, 0.1]).max() < 0.08, name
        pieces = [len(text) for split in SPLITS for text in getattr(splits, split)]
        assert min(pieces) >= embedded.SHORT_CHARS and max(pieces) <= embedded.PIECE_CHARS[1], name


def test_embedded_test_text_is_not_in_public_or_train(installed):
    """Licences and descriptions repeat each other: without the check for it, legal is at 0.06 and more."""
    def runs(texts):
        words = [text.lower().split() for text in texts]
        return {tuple(each[i:i + 13]) for each in words for i in range(len(each) - 12)}

    read = runs(text for splits in installed.domains.values() for text in splits.public + splits.train)
    for name, splits in installed.domains.items():
        tested = runs(splits.test)
        assert len(tested & read) < 0.02 * len(tested), name


def test_embedded_corpus_is_deterministic(installed):
    assert embedded.embedded_corpus() == installed


def test_embedded_corpus_heeds_forgetting(installed, monkeypatch):
    monkeypatch.setattr("sam_ds.data.corpus.embedded_corpus", lambda: installed)
    legal = installed.domains["legal"]
    forgotten = load_corpus("embedded", forgetting=("legal",)).domains["legal"]
    assert forgotten.public == legal.public + legal.train and forgotten.train == ()


def test_pieces_of_a_document_stay_together():
    documents = [(f"document {i}", [f"{i}:{j} " + "x" * 500 for j in range(i % 5 + 1)]) for i in range(60)]
    splits = embedded._split("any", documents)
    homes = {}
    for split in SPLITS:
        for text in getattr(splits, split):
            homes.setdefault(text.partition(":")[0], set()).add(split)
    assert len(homes) == 60 and all(len(each) == 1 for each in homes.values())


def test_a_paragraph_that_was_mostly_there_is_dropped():
    licence = " ".join(f"word{i}" for i in range(40))
    seen = set()
    changed = licence.replace("word0 ", "Word0, ").replace("word30", "another")
    fresh = " ".join(f"other{i}" for i in range(40))
    assert list(embedded._unseen([licence, "Short.", changed, fresh, "short"], seen)) == [licence, "Short.", fresh]


def test_too_few_documents_are_refused():
    with pytest.raises(InputError, match="only 2 documents .* 'legal'"):
        embedded._split("legal", [("a", ["x" * 500]), ("b", ["y" * 500])])
    with pytest.raises(InputError, match="only 0 documents"):
        embedded._split("legal", [])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9000), max_size=6))
def test_pieces_lose_nothing_but_blank_lines(lengths):
    blocks = ["".join("\n" if i % 70 == 69 else "abcdefg"[i % 7] for i in range(length)).strip("\n") + "z"
              for length in lengths]
    pieces = list(embedded._pieces(part for block in blocks for part in embedded._cut(block, 4000)))
    assert "".join("".join(pieces).split()) == "".join("".join(blocks).split())
    assert all(len(piece) <= embedded.PIECE_CHARS[1] for piece in pieces)


# --- partitions ------------------------------------------------------------------------------------------

def dealt(clients):
    return sorted(text for client in clients for text in client.texts)


@pytest.mark.parametrize("scheme", ["domain", "dirichlet", "iid"])
def test_every_train_document_goes_to_exactly_one_client(scheme):
    corpus = toy(code=40, legal=23, medical=31)
    clients = partition_clients(corpus, clients=7, scheme=scheme, alpha=0.3, seed=5)
    assert [client.client for client in clients] == list(range(7))
    assert dealt(clients) == sorted(text for splits in corpus.domains.values() for text in splits.train)
    assert sorted(text for client in clients for text in client.valid) == sorted(
        text for splits in corpus.domains.values() for text in splits.valid)
    assert all(client.examples == len(client.texts) > 0 for client in clients)
    assert clients == partition_clients(corpus, clients=7, scheme=scheme, alpha=0.3, seed=5)


def test_domain_clients_hold_one_domain_evenly():
    clients = NaturalIdPartitioner(num_partitions=5).partition(toy(legal=11, code=20))
    assert [client.domain for client in clients] == ["code", "legal", "code", "legal", "code"]
    assert all(text.startswith(client.domain) for client in clients for text in client.texts + client.valid)
    assert [client.examples for client in clients] == [7, 6, 7, 5, 6]


def test_iid_clients_have_the_same_mixture():
    clients = IidPartitioner(num_partitions=4).partition(toy(a=40, b=21))
    for client in clients:
        count = Counter(text.split()[0] for text in client.texts)
        assert count["a"] == 10 and count["b"] in (5, 6) and client.domain == "a"


def test_dirichlet_is_skewed_for_a_small_alpha_and_even_for_a_large_one():
    corpus = toy(a=400, b=400, c=400)

    def spread(alpha):
        clients = DirichletPartitioner(num_partitions=4, alpha=alpha, seed=1).partition(corpus)
        counts = np.array([[sum(text.startswith(name) for text in client.texts) for name in "abc"]
                           for client in clients])
        return counts.std(axis=0).mean()

    assert spread(0.1) > 100 > 10 > spread(1000.0)
    one, other = (partition_clients(corpus, clients=4, scheme="dirichlet", alpha=0.5, seed=s) for s in (0, 1))
    assert one != other


def test_dirichlet_gives_everyone_the_least_size():
    corpus = toy(a=60, b=60)
    for seed in range(20):
        clients = DirichletPartitioner(num_partitions=10, alpha=0.05, min_partition_size=8, seed=seed
                                       ).partition(corpus)
        assert min(client.examples for client in clients) >= 8
        assert len(set(dealt(clients))) == 120


def test_forgetting_domains_have_no_client():
    corpus = build_corpus("toy", toy(a=8, b=8).domains | {
        "f": Splits(public=("f 0",), train=(), valid=("f valid",), test=("f test",))})
    for scheme in ("domain", "dirichlet", "iid"):
        clients = partition_clients(corpus, clients=2, scheme=scheme)
        assert not any(text.startswith("f") for client in clients for text in client.texts + client.valid)


@pytest.mark.parametrize("arguments, message", [
    ({"clients": 1}, "at least 2, the number of domains"),
    ({"clients": 0}, "at least 1"),
    ({"clients": 2, "scheme": "shards"}, "'domain', 'dirichlet' or 'iid', got 'shards'"),
    ({"clients": 2, "scheme": "dirichlet", "alpha": 0.0}, "alpha"),
    ({"clients": 17, "scheme": "dirichlet"}, "17 clients of 1 documents or more need 17, the corpus has 16"),
    ({"clients": 17, "scheme": "iid"}, "client 16 of 17"),
    ({"clients": 17, "scheme": "domain"}, "client 16 of 17"),
])
def test_impossible_partitions_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        partition_clients(toy(a=8, b=8), **arguments)


def test_a_corpus_that_is_all_public_has_no_clients():
    corpus = build_corpus("toy", {"a": Splits(public=("x",), train=(), valid=(), test=("t",))})
    with pytest.raises(InputError, match="no train documents"):
        partition_clients(corpus, clients=1)


# --- batches ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text to learn pieces of"], 280)


def test_pack_joins_documents_by_eos_and_drops_the_remainder(tokenizer):
    texts = ["to learn", "text", "", "pieces of some text"]
    encoded = [tokenizer(text)["input_ids"] for text in texts if text]
    joined = encoded[0] + [tokenizer.eos_token_id] + encoded[1] + [tokenizer.eos_token_id] + encoded[2]
    rows = pack(texts, tokenizer, 4)
    assert rows.dtype == np.int64 and rows.shape == (len(joined) // 4, 4)
    assert rows.ravel().tolist() == joined[:rows.size]
    assert len(joined) % 4 != 0, "the remainder is part of what is tested"


def test_pack_stops_at_the_limit(tokenizer):
    texts = ["to learn pieces"] * 300
    rows = pack(texts, tokenizer, 8, limit_tokens=60)
    assert rows.shape == (7, 8)
    np.testing.assert_array_equal(rows, pack(texts, tokenizer, 8)[:7])


def test_pack_says_what_is_missing(tokenizer):
    count = len(tokenizer("text")["input_ids"])
    with pytest.raises(InputError, match=f"1 documents give {count} tokens, one row needs sequence = 64"):
        pack(["text"], tokenizer, 64)
    with pytest.raises(InputError, match=r"limit_tokens = 10\)"):
        pack(["text"] * 100, tokenizer, 64, limit_tokens=10)
    with pytest.raises(InputError, match="sequence must be at least 1"):
        pack(["text"], tokenizer, 0)


def test_pack_falls_back_to_bos_and_names_a_tokenizer_with_neither():
    bare = train_tokenizer(["a"], 260)
    bare.name_or_path = "models/bare"
    bare.eos_token = None
    assert pack(["a", "b"], bare, 3).tolist()[0][1] == bare.bos_token_id
    bare.bos_token = None
    with pytest.raises(InputError, match="'models/bare' has neither"):
        pack(["a"], bare, 1)


@given(rows=st.integers(1, 40), batch=st.integers(1, 12), steps=st.integers(0, 12))
def test_batches_visit_every_row_before_any_twice(rows, batch, steps):
    order = batch_indices(rows, batch, steps, [1, 2, 3])
    assert order.shape == (steps, batch) and order.dtype == np.int64
    flat = order.ravel()
    for start in range(0, len(flat), rows):
        epoch = flat[start:start + rows]
        assert len(set(epoch.tolist())) == len(epoch) and set(epoch.tolist()) <= set(range(rows))
    np.testing.assert_array_equal(order, batch_indices(rows, batch, steps, [1, 2, 3]))


def test_batches_depend_on_every_integer_of_the_seed():
    assert len({batch_indices(50, 5, 4, seed).tobytes() for seed in ([0, 0, 1], [0, 1, 0], [1, 0, 0])}) == 3
    # A longer run begins as a shorter one.
    np.testing.assert_array_equal(batch_indices(7, 3, 9, [4])[:5], batch_indices(7, 3, 5, [4]))
