"""The architectures that llama.cpp knows, and what it asserts of some of them.

Taken from the source of llama.cpp 0c1e57098: src/llama-arch.cpp, and the files in src/models.
"""

from __future__ import annotations


def _named(names: str) -> frozenset[str]:
    return frozenset(names.split())


ARCHITECTURES = _named(
    """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon
    chatglm codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32
    deepseek4 dflash dots1 dots3note dream eagle3 ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon
    falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa glm4 glm4moe glm5-next
    gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe hrm_text
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3 kimi-k3
    kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba mamba2 maple mellum
    mimo2 minicpm minicpm3 minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 modern-bert mpt muse-glimmer nanbeige
    nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr
    pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35
    qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1 rwkv6 rwkv6qwen2 rwkv7 seed_oss
    smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 t5 t5encoder talkie wavtokenizer-dec xverse
    """
)

# A head of keys is as long as one of values: GGML_ASSERT(n_embd_head == hparams.n_embd_head_k()).
EQUAL_LENGTHS = _named(
    """
    afmoe apertus arcee arctic baichuan bailingmoe2 bert bitnet bloom chameleon chatglm codeshell cogvlm cohere2
    cohere2moe command-r dbrx deci deepseek dots1 dream ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4
    falcon glm4 glm4moe gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 jina-bert-v2 jina-bert-v3 laguna llada llada-moe
    llama llama-embed llama4 maincoder maple mellum minicpm minimax-01 minimax-m2 minimax-m3 mistral3 modern-bert
    mpt muse-glimmer nanbeige nemotron nemotron_h neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion
    paddleocr pangu-embedded phi2 phi3 phimoe plamo pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe
    qwen3moe qwen3tts qwen3vl qwen3vlmoe refact rnd1 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder
    starcoder2 t5 t5encoder talkie xverse
    """
)

# RoPE rotates a whole head: GGML_ASSERT(n_embd_head == n_rot).  All are in EQUAL_LENGTHS.
WHOLE_ROTATION = _named(
    """
    apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deci deepseek dots1 dream ernie4_5
    ernie4_5-moe exaone exaone-moe exaone4 falcon granite granite_swa granitemoe graniteswitch grok grovemoe
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada llada-moe llama llama-embed llama4 maincoder
    mellum minicpm mistral3 olmo olmo2 olmoe orion paddleocr pangu-embedded plamo pockettts qwen2 qwen2moe qwen2vl
    qwen3 qwen3moe qwen3tts qwen3vl qwen3vlmoe rnd1 seed_oss smallthinker smollm3 starcoder2 talkie xverse
    """
)

# They do not use RoPE: llama_model_rope_type, and the graph of bert.
NO_ROTATION = _named(
    """
    arwkv7 bert bloom glm5-next gpt2 jais jamba jina-bert-v2 kimi-k3 kimi-linear mamba mamba2 mpt nemotron_h
    nemotron_h_moe refact rwkv6 rwkv6qwen2 rwkv7 starcoder t5 t5encoder wavtokenizer-dec
    """
)

# Every block has attention, so none may have 0 heads.
ATTENTION_ONLY = _named(
    """
    afmoe apertus arcee arctic baichuan bailingmoe2 bert bitnet bloom chameleon chatglm codeshell cogvlm cohere2
    cohere2moe command-r dbrx deepseek dots1 dream ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon
    falcon-h1 gemma gemma2 gemma3 glm4 glm4moe gpt-oss gpt2 gptneox granite granite_swa granitemoe grok grovemoe
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 jina-bert-v2 jina-bert-v3 llada llada-moe llama
    llama-embed llama4 maincoder maple mellum minicpm minimax-m2 mistral3 modern-bert mpt muse-glimmer nemotron
    neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe
    plamo pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3tts qwen3vl qwen3vlmoe refact rnd1 seed_oss
    smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 t5 t5encoder talkie xverse
    """
)

# RoPE is divided into sections: GGML_ASSERT(sections[0] > 0 || sections[1] > 0 || sections[2] > 0).
SECTIONS = _named(
    """
    paddleocr qwen2vl qwen35 qwen35moe qwen3tts qwen3vl qwen3vlmoe qwen4exp
    """
)

# They exist only with experts: GGML_ASSERT(n_expert > 0).
EXPERTS_ONLY = _named(
    """
    bailingmoe2 glm4moe grovemoe llada-moe smallthinker
    """
)

# Some blocks have a sliding window: GGML_ASSERT(hparams.is_swa_any()).
WINDOWS = _named("gemma2 gemma3 gemma3n gemma4 gpt-oss granite_swa llama4 maple mimo2 spark2_5 step35")

# Each block is recurrent, or has attention, or (in some) neither.  The engine has an input for each of the two kinds,
# and asserts that it is used: GGML_ASSERT(buffer).
HYBRIDS = _named("granitehybrid jamba lfm2 lfm2moe nemotron_h nemotron_h_moe qwen35 qwen35moe qwen3next")
BY_INTERVAL = _named("qwen35 qwen35moe qwen3next")  # of these, every nth block has attention
