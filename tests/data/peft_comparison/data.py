"""A small stand-in for the data module of PEFT's MetaMathQA comparison: its functions, over the same data sets."""

from datasets import load_dataset

VALID_SIZE = 50


def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    train = load_dataset("meta-math/MetaMathQA")["train"]
    gsm8k = load_dataset("openai/gsm8k", "main").rename_columns({"question": "query", "answer": "response"})
    print_fn(f"{len(train)} rows")

    def tokenize(rows, with_answer):
        answers = rows["response"] if with_answer else [""] * len(rows["query"])
        texts = [query_template.format(query=q) + a for q, a in zip(rows["query"], answers, strict=True)]
        tokens = tokenizer(texts)
        return {name: [ids[: tokenizer.model_max_length] for ids in tokens[name]]
                for name in ("input_ids", "attention_mask")}  # fmt: skip

    train = train.map(lambda rows: tokenize(rows, True), batched=True)
    train = train.remove_columns(["type", "query", "original_question"])
    valid, test = (
        gsm8k[split].map(lambda rows: tokenize(rows, False), batched=True).remove_columns(["query"])
        for split in ("train", "test")
    )
    return train, valid.select(range(VALID_SIZE)), test


def get_wiki_small():
    return [row["text"] for row in load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True).take(100)]
