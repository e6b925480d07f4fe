"""Models of transformers with random weights and a batch for each, small enough for a test.

The classes are looked up late: to import them takes seconds.
"""

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 50
TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tokens():
    ids = torch.randint(3, VOCABULARY, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text():
    given = tokens()
    return {**given, "labels": given["input_ids"]}


def images(size):
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 1])}


def bert(**options):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=16, **TRANSFORMER, **options
    )
    return transformers.BertForSequenceClassification(config), {
        **tokens(),
        "labels": torch.tensor([0, 1]),
    }


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, **ENDS, **options
    )
    return transformers.GPT2LMHeadModel(config), text()


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        max_position_embeddings=16,
        **TRANSFORMER,
        **ENDS,
        **options,
    )
    return transformers.LlamaForCausalLM(config), text()


def t5(**options):
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return transformers.T5ForConditionalGeneration(config), text()


def vit(**options):
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_labels=3, **TRANSFORMER, **options
    )
    return transformers.ViTForImageClassification(config), images(8)


def resnet(**options):
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
        **options,
    )
    return transformers.ResNetForImageClassification(config), images(16)


MODELS = {m.__name__: m for m in (bert, gpt2, llama, t5, vit, resnet)}
