#!/usr/bin/env python3
"""Writes small models of sentence-transformers and the vectors that it gives, for tests/tokenizers/sentence.rs.

    pip install torch transformers sentence-transformers sentencepiece safetensors

    bert.safetensors     a drawn BERT, whose folder a case describes
    vocab.txt            its pieces
    albert.safetensors, llama.safetensors, qwen2.safetensors
                         drawn models of other families
    albert.model         its pieces, a unigram model of SentencePiece
    dense.safetensors, dense.bin, square.safetensors, residual.safetensors, norm.safetensors
                         weights of modules
    cases.json           folders by their files, texts, and the vectors of those texts
"""

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AlbertConfig, AlbertModel, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model,
)
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
FOLDER = Path(__file__).parent
DIM = 16
TEXTS = ["The cat sat.", "dogs", "a much longer text than the others, with 2 words!"]

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES += list("abcdefghijklmnopqrstuvwxyz0123456789.,!?-:<>[]|_/") + ["##" + c for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
PIECES += ["the", "cat", "dog", "sat", "##ed", "T", "##T", "C", "é", "##é", "東", "京", "##京", "東京", "ß", "ı", "query", "<s>", "</s>", "<u>"]
# Rows of the table for tokens that are added after them.
VOCABULARY = len(PIECES) + 8

BERT = dict(
    vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=24, hidden_act="gelu",
)
ALBERT = dict(
    vocab_size=168, embedding_size=8, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=24, hidden_act="gelu_new",
)
# Families that continue texts, with the tokenizer of tests/folders.
CAUSAL = dict(
    vocab_size=306, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
    max_position_embeddings=48, tie_word_embeddings=True,
)
MODELS = {
    "bert": (BertModel, BertConfig, BERT), "albert": (AlbertModel, AlbertConfig, ALBERT), "qwen2": (Qwen2Model, Qwen2Config, CAUSAL),
    "llama": (LlamaModel, LlamaConfig, CAUSAL),
}


def draw(shape, seed, scale):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def models():
    (FOLDER / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    for name, (model, config, options) in MODELS.items():
        model, tensors = model(config(**options)), {}
        parameters = [(key, value) for key, value in model.named_parameters() if not key.startswith("pooler")]
        for seed, (key, value) in enumerate(sorted(parameters)):
            tensors[key] = draw(value.shape, seed, 0.4) + (1 if key.lower().endswith("norm.weight") else 0)
        place = "model." if options is CAUSAL else ""
        save_file({place + key: value for key, value in tensors.items()}, FOLDER / f"{name}.safetensors")
    dense = {"linear.weight": draw([8, DIM], 1, 0.5), "linear.bias": draw([8], 2, 0.5)}
    save_file(dense, FOLDER / "dense.safetensors")
    torch.save(dense, FOLDER / "dense.bin")
    save_file({"linear.weight": draw([DIM, DIM], 3, 0.5)}, FOLDER / "square.safetensors")
    save_file(dense | {"residual.weight": draw([8, DIM], 4, 0.5)}, FOLDER / "residual.safetensors")
    save_file({"norm.weight": draw([DIM], 5, 1.0), "norm.bias": draw([DIM], 6, 1.0)}, FOLDER / "norm.safetensors")
    corpus = FOLDER / "corpus.txt"
    words = "the cat sat on a mat Café naïve STRASSE query longer texts than others with words dogs and dog Cats The".split()
    corpus.write_text("\n".join(" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(200)))
    # As `nmt_nfkc` has them, and a hundred thousand more.
    rules = FOLDER / "rules.tsv"
    rules.write_text("9\t20\nA\t20\n200B\t20\nFF21\t41\n301E\t22\n")
    sentencepiece.SentencePieceTrainer.train(
        normalization_rule_tsv=str(rules),
        input=str(corpus), model_prefix=str(FOLDER / "albert"), vocab_size=120, model_type="unigram", pad_id=0, unk_id=1,
        bos_id=-1, eos_id=-1, pad_piece="<pad>", unk_piece="<unk>", control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        hard_vocab_limit=False, minloglevel=2,
    )
    corpus.unlink()
    rules.unlink()
    (FOLDER / "albert.vocab").unlink()


def modules(*kinds, prefix="sentence_transformers.models."):
    """The list of modules, each a class with its folder."""
    listed = [("Transformer", "")] + [kind if isinstance(kind, tuple) else (kind, f"{n}_{kind}") for n, kind in enumerate(kinds, 1)]
    return [{"idx": n, "name": str(n), "path": path, "type": prefix + kind} for n, (kind, path) in enumerate(listed)]


LEGACY = [
    "pooling_mode_cls_token", "pooling_mode_max_tokens", "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken",
]
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


def legacy(*on, **more):
    return {"word_embedding_dimension": DIM} | {key: key in on for key in LEGACY} | more


def pooled(mode="mean", **more):
    return {"embedding_dimension": DIM, "pooling_mode": mode, "include_prompt": True} | more


class Cases:
    def __init__(self):
        self.cases = []

    def add(self, name, files=None, copies=None, model="bert", texts=TEXTS, prompt=None, config=None, encode=None):
        base = MODELS[model][2] | {"model_type": model}
        written = {"config.json": base | (config or {})}
        if model == "bert":
            written |= {"tokenizer_config.json": {"do_lower_case": True}}
        else:
            written |= {"tokenizer_config.json": {"do_lower_case": True}}
        written |= files or {}
        written = {path: content for path, content in written.items() if content is not None}
        place = next((path for path in written if path.endswith("config.json") and "model_type" in written[path]), "")
        inner = str(Path(place).parent)
        copied = {f"{inner}/model.safetensors": f"{model}.safetensors"}
        if model == "bert" and "tokenizer.json" not in written:
            copied[f"{inner}/vocab.txt"] = "vocab.txt"
        if model in ["llama", "qwen2"]:
            copied |= {"vocab.json": "../folders/vocab.json", "merges.txt": "../folders/merges.txt"}
        if model == "albert":
            copied[f"{inner}/spiece.model"] = "albert.model"
        copied |= copies or {}
        copied = {path: source for path, source in copied.items() if source}
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            for path, content in written.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))
            for path, source in copied.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(FOLDER / source, folder / path)
            loaded = SentenceTransformer(str(folder), device="cpu")
            vectors = loaded.encode(texts, convert_to_tensor=True, **(prompt or {}), **(encode or {}))
            asked = {key: value for key, value in (prompt or {}).items()}
            text_prompt = loaded._resolve_prompt(asked.get("prompt"), asked.get("prompt_name")) or ""
            lengths = [[len(loaded.tokenizer(text_prompt + text, truncation=t).input_ids) for t in (False, True)] for text in texts]
            similarity = loaded.similarity(vectors, vectors)
        self.cases.append({
            "name": name,
            "files": {path: content if isinstance(content, str) else json.dumps(content) for path, content in written.items()},
            "copies": copied,
            "texts": texts,
            "prompt": prompt,
            "vectors": [[round(x, 5) for x in row] for row in vectors.tolist()],
            "cut": [[n, whole, kept] for n, (whole, kept) in enumerate(lengths) if kept < whole],
            "similarity_fn": loaded.similarity_fn_name,
            "similarity": [[round(x, 4) for x in row] for row in similarity.tolist()] if name.startswith("similarity") else [],
        })

    def sentences(self, name, *kinds, pooling=None, files=None, prefix="sentence_transformers.models.", **more):
        """A folder of sentence-transformers with a pooling and more modules."""
        listed = {"modules.json": modules("Pooling", *kinds, prefix=prefix), "1_Pooling/config.json": pooling or pooled()}
        self.add(name, files=listed | {"sentence_bert_config.json": {"max_seq_length": 24}} | (files or {}), **more)


def poolings(cases):
    for mode in MODES:
        cases.sentences(f"pooling {mode}", pooling=pooled(mode))
    for mode in LEGACY:
        cases.sentences(mode, pooling=legacy(mode))
    cases.sentences("pooling of old files without any", pooling=legacy())
    cases.sentences("pooling of several old ones", pooling=legacy("pooling_mode_lasttoken", "pooling_mode_cls_token", "pooling_mode_max_tokens"))
    cases.sentences("pooling of a list", pooling=pooled(["lasttoken", "mean", "cls"]))
    cases.sentences("pooling of a list of one", pooling=pooled(["max"]))
    cases.sentences("pooling without options", pooling={"embedding_dimension": DIM})
    for mode in MODES:
        cases.sentences(f"pooling {mode} without the prompt", pooling=pooled(mode, include_prompt=False), prompt={"prompt": "query: "})
    cases.sentences(
        "prompt longer than the model takes", pooling=pooled(["mean", "cls"], include_prompt=False),
        files={"sentence_bert_config.json": {"max_seq_length": 6}}, prompt={"prompt": "a query with words: "},
    )


def denses(cases):
    def dense(name, *, weights="dense", last=8, pooling=None, kinds=("Dense",), copies=None, **options):
        config = {"in_features": DIM, "out_features": last, "bias": True} | options
        copies = copies or {"2_Dense/model.safetensors": f"{weights}.safetensors"}
        cases.sentences(name, *kinds, files={"2_Dense/config.json": config}, copies=copies, pooling=pooling)

    for kind in ["Tanh", "Sigmoid", "ReLU", "GELU", "SiLU", "LeakyReLU", "ELU", "ReLU6"]:
        dense(f"dense {kind}", activation_function=f"torch.nn.modules.activation.{kind}")
    dense("dense Identity", activation_function="torch.nn.modules.linear.Identity")
    dense("dense of the short class path", activation_function="torch.nn.ReLU")
    dense("dense without activation")
    dense("dense in a pickle", copies={"2_Dense/pytorch_model.bin": "dense.bin"})
    dense("dense without bias", weights="square", last=DIM, bias=False)
    dense("dense with its input", weights="square", last=DIM, bias=False, use_residual=True)
    dense("dense with a residual", weights="residual", use_residual=True)
    dense("dense and normalize", kinds=("Dense", "Normalize"))
    tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    files = {
        "modules.json": modules(("Dense", "1_Dense"), ("Normalize", "2_Normalize"), ("Pooling", "3_Pooling")),
        "sentence_bert_config.json": {"max_seq_length": 24},
        "1_Dense/config.json": {"in_features": DIM, "out_features": 8, "bias": True} | tokens,
        "2_Normalize/config.json": tokens, "3_Pooling/config.json": pooled(embedding_dimension=8),
    }
    cases.add("dense of tokens", files=files, copies={"1_Dense/model.safetensors": "dense.safetensors"})
    norm = {"2_LayerNorm/model.safetensors": "norm.safetensors"}
    files = {"2_LayerNorm/config.json": {"dimension": DIM}, "3_Dropout/config.json": {"dropout": 0.5}}
    cases.sentences("layer norm, dropout and normalize", "LayerNorm", "Dropout", "Normalize", files=files, copies=norm)


def folders(cases):
    cases.add("no modules")
    cases.add("no modules, other files are not read", files={
        "sentence_bert_config.json": {"max_seq_length": 4, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    })
    cases.sentences("class paths of today", "Normalize", prefix="sentence_transformers.sentence_transformer.modules.")
    classes = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling", "base.modules.normalize.Normalize"]
    listed = modules("Pooling", "Normalize")
    for module, path in zip(listed, classes):
        module["type"] = f"sentence_transformers.{path}"
    cases.add("full class paths of today", files={"modules.json": listed, "1_Pooling/config.json": pooled("cls")})
    tokenizer = {"0_Transformer/tokenizer_config.json": {"do_lower_case": False}}
    listed = modules(("Pooling", "p"))
    listed[0]["path"] = "0_Transformer"
    cases.add("a folder for each module", files=tokenizer | {
        "modules.json": listed, "p/config.json": pooled("max"), "config.json": None, "tokenizer_config.json": None,
        "0_Transformer/config.json": BERT | {"model_type": "bert"}, "0_Transformer/sentence_roberta_config.json": {"max_seq_length": 7},
    })


def lengths(cases):
    def bound(name, sentence=None, tokenizer=None, **more):
        files = {"sentence_bert_config.json": sentence, "tokenizer_config.json": {"do_lower_case": True} | (tokenizer or {})}
        cases.sentences(name, files=files, texts=TEXTS + ["the cat sat " * 12], **more)

    bound("cut to max_seq_length", {"max_seq_length": 6})
    bound("cut to max_seq_length, pooled by the last token", {"max_seq_length": 6}, pooling=pooled("lasttoken"))
    bound("cut to the tokens around", {"max_seq_length": 2})
    bound("cut to model_max_length", {}, {"model_max_length": 9})
    bound("cut to max_position_embeddings", None, {"model_max_length": 10**30})
    bound("max_seq_length takes precedence", {"max_seq_length": 11}, {"model_max_length": 9})
    bound("options of the tokenizer take precedence", {"max_seq_length": 11, "tokenizer_args": {"model_max_length": 5}})
    bound("cut on the left", {"max_seq_length": 7}, {"truncation_side": "left"})
    bound("cut with a prompt", {"max_seq_length": 9}, prompt={"prompt": "query: "})
    cases.add("cut without modules", texts=["the cat sat " * 12, "dog"])


def settings(cases):
    asked = {"prompts": {"query": "query: ", "passage": "the "}, "default_prompt_name": "query"}
    files = {"config_sentence_transformers.json": asked | {"__version__": {"sentence_transformers": "3.0.0"}}}
    cases.sentences("default prompt", files=files)
    cases.sentences("prompt by name", files=files, prompt={"prompt_name": "passage"})
    cases.sentences("prompt by name that is empty", files=files, prompt={"prompt_name": "document"})
    cases.sentences("prompt in place of the default", files=files, prompt={"prompt": "dog "})
    cases.sentences("no prompt in place of the default", files=files, prompt={"prompt": ""})
    for name in ["cosine", "dot", "euclidean", "manhattan"]:
        files = {"config_sentence_transformers.json": {"similarity_fn_name": name, "prompts": {}, "default_prompt_name": None}}
        cases.sentences(f"similarity {name}", files=files)
    cases.sentences("fewer features", "Normalize", files={"config_sentence_transformers.json": {"truncate_dim": 5}})


ODD = ["Café naïve", "the 東京 cat", "É The T", "STRAßE ı", "the\tcat\u200b\nsat \ufffd \u0301e"]


def word_pieces(cases):
    def tokenizer(name, options, texts=ODD, **files):
        cases.add(name, files={"tokenizer_config.json": options} | {key.replace("_json", ".json"): value for key, value in files.items()}, texts=texts)

    tokenizer("word pieces without settings", {})
    tokenizer("word pieces of large letters", {"do_lower_case": False})
    tokenizer("word pieces with accents", {"strip_accents": False})
    tokenizer("word pieces of large letters without accents", {"do_lower_case": False, "strip_accents": True})
    tokenizer("word pieces of Chinese words", {"tokenize_chinese_chars": False})
    tokenizer("word pieces of a fast class", {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False})
    tokenizer("word pieces that are never split", {"never_split": ["Café"], "do_basic_tokenize": True})
    cases.sentences("lower case before the tokenizer", files={
        "tokenizer_config.json": {"do_lower_case": False}, "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": True},
    }, texts=ODD)
    cases.sentences("lower case before added tokens", files={
        "tokenizer_config.json": {"do_lower_case": False}, "added_tokens.json": {"[ENT]": len(PIECES), "xy": len(PIECES) + 1},
        "sentence_bert_config.json": {"do_lower_case": True},
    }, texts=["the [ENT] cat", "XY the xy"])
    cases.sentences("options of the tokenizer in the module", files={
        "sentence_bert_config.json": {"processor_kwargs": {"do_lower_case": False, "strip_accents": False}},
    }, texts=ODD)
    names = {"cls_token": "<s>", "sep_token": "</s>", "unk_token": "<u>"}
    texts = ["the <s> cat", "the [CLS] cat", "the 語 cat </s>"]
    tokenizer("other special tokens", names, texts)
    tokenizer("other special tokens in the map", {}, texts, special_tokens_map_json=names)
    flags = dict.fromkeys(["lstrip", "rstrip", "normalized", "single_word"], False)
    objects = {key: {"content": name} | flags for key, name in names.items()}
    tokenizer("other special tokens as objects", {key: {"__type": "AddedToken"} | token for key, token in objects.items()}, texts)
    tokenizer("other special tokens as objects in the map", {}, texts, special_tokens_map_json=objects)


def added(cases):
    first = len(PIECES)
    texts = ["the [ENT] cat", "x[ENT]y", "the [ent] cat", "a [ENT]. [OTHER] dog <u>", "x [ENT]cat [OTHER]"]

    def tokens(name, options=None, texts=texts, **files):
        options = {"do_lower_case": True} | (options or {})
        cases.add(name, files={"tokenizer_config.json": options} | {key.replace("_json", ".json"): value for key, value in files.items()}, texts=texts)

    tokens("added tokens", added_tokens_json={"[ENT]": first, "[OTHER]": first + 1})
    tokens("added tokens, special by the map", added_tokens_json={"[ENT]": first, "[OTHER]": first + 1},
           special_tokens_map_json={"additional_special_tokens": ["[ENT]"]})
    tokens("added tokens in any order", added_tokens_json={"[OTHER]": first + 1, "[ENT]": first})
    tokens("added tokens of large letters", {"do_lower_case": False}, added_tokens_json={"[ENT]": first})
    token = {"content": "[ENT]", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    for flags in [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}, {"single_word": True}, {"special": True}]:
        decoder = {str(first): token | flags, "2": token | {"content": "[CLS]", "special": True}}
        tokens(f"added token with {list(flags)}", {"added_tokens_decoder": decoder})
    decoder = {str(first): token, str(first + 1): token | {"content": "[OTHER]", "normalized": True}}
    tokens("added tokens by their ids", {"added_tokens_decoder": decoder}, added_tokens_json={"[NOT]": first})
    tokens("more special tokens", {"additional_special_tokens": ["[ENT]", "[OTHER]"]})
    tokens("more special tokens as objects", {"additional_special_tokens": [token | {"__type": "AddedToken", "lstrip": True}, "[OTHER]"]})
    tokens("extra special tokens", {"extra_special_tokens": ["[ENT]", "[OTHER]"]})
    tokens("extra special tokens by names", {"extra_special_tokens": {"ent_token": "[ENT]"}})
    tokens("a token of a name of its own", {"ent_token": "[ENT]"})
    tokens("special tokens that are split", {"split_special_tokens": True}, ["the [SEP] cat", "the [CLS]"])
    tokens("a piece as a special token", {"additional_special_tokens": ["cat", "<u>"]}, ["the cat sat", "cats <u>"])


def described(cases):
    """Folders with a `tokenizer.json`."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "config.json").write_text(json.dumps(BERT | {"model_type": "bert"}))
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
        saved = json.loads((folder / "saved/tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    first = len(PIECES)

    def tokenizer(name, options, texts=ODD, **files):
        files = {key.replace("_json", ".json"): value for key, value in files.items()}
        cases.add(name, files={"tokenizer_config.json": options, "tokenizer.json": saved} | files, texts=texts)

    bert = {"tokenizer_class": "BertTokenizer"}
    tokenizer("described", bert)
    tokenizer("described without settings", {})
    tokenizer("described, of large letters", bert | {"do_lower_case": False})
    tokenizer("described, with accents", bert | {"strip_accents": False, "tokenize_chinese_chars": False})
    cased = saved | {"normalizer": saved["normalizer"] | {"lowercase": False}}
    tokenizer("described, of large letters, for a class that lower-cases", bert, tokenizer_json=cased)
    tokenizer("described, of large letters, of no class", {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True, "pad_token": "[PAD]"}, tokenizer_json=cased)
    token = {"content": "[ENT]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    texts = ["the [ENT] cat", "x[ENT]y", "the [OTHER] cat"]
    tokenizer("described, with added tokens", bert | {"added_tokens_decoder": {str(first): token}, "additional_special_tokens": ["[OTHER]"]}, texts)
    tokenizer("described, of no class, with added tokens", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "added_tokens_decoder": {str(first): token}}, texts)
    tokenizer("described, with added tokens of old files", bert, texts, added_tokens_json={"[ENT]": first})


def alberts(cases):
    texts = ["The cat sat on ``a mat''.", "Café naïve", "two  spaces\tand\nlines\u3000of text ", "[CLS] the [MASK] dogs"]

    def tokenizer(name, options, texts=texts, **files):
        files = {key.replace("_json", ".json"): value for key, value in files.items()}
        cases.add(name, model="albert", files={"tokenizer_config.json": options} | files, texts=texts)

    tokenizer("sentence pieces", {})
    tokenizer("sentence pieces with accents", {"keep_accents": True})
    tokenizer("sentence pieces of large letters", {"do_lower_case": False, "remove_space": True})
    tokenizer("sentence pieces with added tokens", {"additional_special_tokens": ["[ENT]"]}, ["the [ENT] cat", "x[ENT]y"])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copy(FOLDER / "albert.model", folder / "spiece.model")
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "config.json").write_text(json.dumps(ALBERT | {"model_type": "albert"}))
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
        saved = json.loads((folder / "saved/tokenizer.json").read_text())
    for name, options in [("", {}), (", of large letters", {"do_lower_case": False}), (", with accents", {"keep_accents": True})]:
        options |= {"tokenizer_class": "AlbertTokenizer"}
        cases.add(f"described sentence pieces{name}", model="albert", files={"tokenizer_config.json": options, "tokenizer.json": saved}, texts=texts)


def activations(cases):
    for name in ["relu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "quick_gelu", "silu", "swish", "relu2"]:
        cases.add(f"BERT with {name}", config={"hidden_act": name})
    cases.add("ALBERT with relu", model="albert", config={"hidden_act": "relu"})


def causal(cases):
    for model in ["qwen2", "llama"]:
        for mode in ["lasttoken", "mean", "weightedmean"]:
            options = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "padding_side": "left"}
            files = {"tokenizer_config.json": options, "sentence_bert_config.json": {"max_seq_length": 30}}
            cases.sentences(f"{model} by {mode}", "Normalize", model=model, pooling=pooled(mode), files=files, prompt={"prompt": "the "})


def main():
    models()
    cases = Cases()
    for make in [poolings, denses, folders, lengths, settings, word_pieces, added, described, alberts, activations, causal]:
        make(cases)
    lines = [json.dumps(case, ensure_ascii=False) for case in cases.cases]
    (FOLDER / "cases.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(len(cases.cases), "cases")


main()
