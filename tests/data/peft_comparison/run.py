"""A small stand-in for the run script of PEFT's comparison, with the same course: no callback, one optimizer."""

import argparse
import json
import os
import random
from pathlib import Path

import torch
from data import get_train_valid_test_datasets, get_wiki_small
from peft import PeftConfig
from peft.utils import infer_device
from transformers import set_seed
from utils import (
    FILE_NAME_TRAIN_PARAMS,
    RESULT_PATH,
    RESULT_PATH_TEST,
    get_model,
    get_optimizer_and_scheduler,
    get_peft_branch,
    get_tokenizer,
    get_train_config,
    init_accelerator,
    validate_experiment_path,
)


def train(model, tokenizer, settings):
    accelerator = getattr(torch, infer_device(), torch.cuda)
    optimizer, scheduler = get_optimizer_and_scheduler(
        model,
        optimizer_type=settings.optimizer_type,
        max_steps=settings.max_steps,
        lr_scheduler_arg=None,
        **settings.optimizer_kwargs,
    )
    rows = get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=settings.query_template, print_fn=print_verbose
    )[0]
    losses = []
    model.train()
    for step in range(settings.max_steps):
        part = rows[step * settings.batch_size : (step + 1) * settings.batch_size]
        part.pop("response")
        batch = tokenizer.pad(part, return_tensors="pt").to(model.device)
        optimizer.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        accelerator.empty_cache()
    return losses


def main(path, name):
    branch = get_peft_branch()
    config = PeftConfig.from_pretrained(path)
    settings = get_train_config(os.path.join(path, FILE_NAME_TRAIN_PARAMS))  # noqa: PTH118
    set_seed(settings.seed)
    memory = init_accelerator()
    tokenizer = get_tokenizer(model_id=settings.model_id, max_seq_length=settings.max_seq_length)
    model = get_model(model_id=settings.model_id, peft_config=config)
    losses = train(model, tokenizer, settings)
    trained, total = model.get_nb_trainable_parameters()
    folder = Path(RESULT_PATH if branch == "main" else RESULT_PATH_TEST)
    result = {"experiment": name, "branch": branch, "losses": losses, "trained": trained, "total": total}
    result |= {"memory": memory, "config": config.to_dict(), "wiki": len(get_wiki_small()), "random": random.random()}
    result["supports"] = {
        name: state.support.indices.tolist()
        for name, state in model.named_modules()
        if name.endswith("adapter.default")
    }  # for the tests; PEFT's script saves the adapter
    (folder / f"{name.replace('/', '--')}.json").write_text(json.dumps(result, default=list))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("path_experiment")
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()

    def print_verbose(*words):
        if args.verbose:
            print(*words)

    main(args.path_experiment, validate_experiment_path(args.path_experiment))
