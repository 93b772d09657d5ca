"""The card's sentences that are the same for every checkpoint; no figures in here."""

SOFTWARE = """\
Without FP4 hardware an NVFP4 layer decodes its weights exactly and leaves activations alone. Any
use needs tests of its own on the task, the hardware and the software at hand."""

VLLM_UNTRIED = (
    "The flags are those of vLLM 0.20 to 0.25 that the files of this checkpoint call for. The "
    "command was not run for this card."
)

TRAINING_DATA = (
    "Nothing was trained for this checkpoint. The training data is that of the base model, as its "
    "own card describes it."
)

FORMATS = (
    "FP8 is e4m3 with one scale per tensor. NVFP4 is e2m1 in blocks of sixteen with an e4m3 scale "
    "each and one float32 scale per tensor; layers that run fused share it."
)

USAGE = """\
Serve it FROM:

```sh
halfbyte serve FOLDER --port 8000 --served-model-name TITLE --max-model-len LENGTH
```

Ask it:

```sh
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d BODY
```

Check that the files are whole, and evaluate it again:

```sh
halfbyte verify FOLDER
halfbyte evaluate http://127.0.0.1:8000 --suite quick
```"""

VERDICTS = (
    "Each end of an interval is wrong at most one time in twenty (less often where several looks "
    "were planned). GO: the lower end lies above minus the margin. NO-GO: the upper end lies below "
    "it, and still does when all benchmarks are counted as looks (p beyond, Holm). INCONCLUSIVE: "
    "neither; this is not evidence of equality."
)

SPEED = (
    "`x` is the figure as a multiple of what stands before it. Times depend on the machine and its "
    "software; those of another machine are not a forecast for yours."
)

FIDELITY = (
    "These figures show whether a layer is broken, and which of two very different quantizations "
    "is closer to the source. They measure how much changed, not whether it got worse: no verdict "
    "above rests on them. The answers counted here are single letters, given without reasoning."
)

LIMITATIONS = (
    "It has the limitations of the base model: it may give answers that are wrong, biased, "
    "offensive or unsafe, also to harmless prompts. Quantization may change single answers even "
    "where average scores agree, and rare abilities more than common ones."
)

ETHICS = (
    "Whoever deploys this model is responsible for checking that it meets the requirements of the "
    "use, the industry and the law that apply, for the rights in what it is given and gives, "
    "pictures included, and for measures against misuse."
)
