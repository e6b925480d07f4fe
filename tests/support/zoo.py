"""Small models of many architectures with random weights, and what each is called with."""

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WORDS = 50
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def words():
    ids = torch.randint(3, WORDS, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pairs():
    return {**words(), "decoder_input_ids": torch.randint(3, WORDS, (2, 5))}


def pixels(size=16):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def images_and_words():
    return {**words(), **pixels()}


def sound():
    return {"input_values": torch.randn(2, 400)}


def spectra():
    return {
        "input_features": torch.randn(2, 8, 40),
        "decoder_input_ids": torch.randint(3, WORDS, (2, 5)),
    }


VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {**VISION, "intermediate_size": 32, "image_size": 16, "patch_size": 8}

MODELS = {
    "bert": ("BertForMaskedLM", SIZES, words),
    "roberta": ("RobertaForSequenceClassification", SIZES, words),
    "electra": ("ElectraForTokenClassification", {**SIZES, "embedding_size": 8}, words),
    "albert": ("AlbertForMaskedLM", {**SIZES, "embedding_size": 8}, words),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        words,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
        words,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES, words),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}, words),
    "bloom": ("BloomForCausalLM", {**SIZES, "n_layer": 2, "n_head": 2}, words),
    "llama": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 1}, words),
    "mistral": ("MistralForCausalLM", {**SIZES, "num_key_value_heads": 1}, words),
    "qwen2": ("Qwen2ForCausalLM", {**SIZES, "num_key_value_heads": 1}, words),
    "gemma": ("GemmaForCausalLM", {**SIZES, "num_key_value_heads": 1, "head_dim": 8}, words),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
        pairs,
    ),
    "bart": ("BartForConditionalGeneration", BART, pairs),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
        spectra,
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {
            **SIZES,
            "conv_dim": (8, 8),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        sound,
    ),
    "vit": ("ViTForImageClassification", PATCHES, pixels),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
        | {"window_size": 2},
        pixels,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        pixels,
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        pixels,
    ),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        {"image_size": 32, "depth_multiplier": 0.25, "depth_divisible_by": 4, "min_depth": 4},
        lambda: pixels(32),
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": SIZES,
            "vision_config": PATCHES,
            "projection_dim": 8,
        },
        images_and_words,
    ),
}
"""By name: the class, what its configuration says, and what makes its arguments."""

BLOCKS = {
    "bert": "bert.encoder.layer.*",
    "gpt2": "transformer.h.*",
    "llama": "model.layers.*",
    "t5": "encoder.block.*",
    "bart": "model.decoder.layers.*",
    "whisper": "model.encoder.layers.*",
    "vit": "vit.layers.*",
}
"""Of some of them the names of whole blocks."""


def make(name):
    """Return a model in evaluation mode and the arguments of a call of it."""
    class_name, options, arguments = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    given = arguments()
    model = cls(cls.config_class(**options)).eval()
    return model, given


def output(model, given):
    """Return what a model gives for the arguments: its logits."""
    with torch.no_grad():
        found = model(**given)
    return found.logits if "logits" in found else found.logits_per_text
