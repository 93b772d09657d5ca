"""The card's sentences that are the same for every checkpoint; no figures in here."""

USE_CASE = (
    "Developers who want to run the base model with less memory: chat assistants, agents with "
    "tools, code, retrieval over long documents, and other text generation that the base model is "
    "made for."
)

OUTPUT = """\
- **Types:** text
- **Format:** chat completions, streamed or whole
- **Parameters:** text (1D)
- **Other:** reasoning and tool calls where the chat template has them"""

SOFTWARE = """\
- **Runtimes:** halfbyte; servers that read NVIDIA Model Optimizer's checkpoint layout
- **Hardware:** NVIDIA GPUs; a CPU for small models and for checking
- **Operating system:** Linux

Without FP4 hardware an NVFP4 layer decodes its weights exactly and leaves activations alone. Any
use needs tests of its own on the task, the hardware and the software at hand."""

TRAINING_DATA = (
    "Nothing was trained for this checkpoint. The training data is that of the base model, as its "
    "own card describes it."
)

FORMATS = (
    "FP8 is e4m3 with one scale per tensor. NVFP4 is e2m1 in blocks of sixteen with an e4m3 scale "
    "each and one float32 scale per tensor; layers that run fused share it."
)

USAGE = """\
Serve it:

```sh
halfbyte serve . --port 8000 --served-model-name TITLE --max-model-len LENGTH
```

Ask it:

```sh
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d BODY
```

Check that the files are whole, and evaluate it again:

```sh
halfbyte verify .
halfbyte evaluate http://127.0.0.1:8000 --suite pocket
```"""

VERDICTS = (
    "Each end of an interval is wrong at most one time in twenty (less often where several looks "
    "were planned). GO: the lower end lies above minus the margin. NO-GO: the upper end lies below "
    "it, and still does when all benchmarks are counted as looks (p beyond, Holm). INCONCLUSIVE: "
    "neither; this is not evidence of equality."
)

FIDELITY = (
    "These figures find broken layers and rank recipes that are far apart. They measure how much "
    "changed, not whether it got worse: no verdict above rests on them. Answers are letters given "
    "without reasoning."
)

LIMITATIONS = (
    "It has the limitations of the base model: it may give answers that are wrong, biased, "
    "offensive or unsafe, also to harmless prompts. Quantization may change single answers even "
    "where average scores agree, and rare abilities more than common ones."
)

ETHICS = (
    "Whoever deploys this model is responsible for checking that it meets the requirements of the "
    "use, the industry and the law that apply, and for measures against misuse. Report security "
    "problems and concerns to the maintainers of the project in private."
)
