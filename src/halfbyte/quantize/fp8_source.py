"""bf16 checkpoint -> the FP8 dialect in which Mistral publishes, inputs measured on text.

The real job starts from such a source; this makes one of any bf16 checkpoint. Measuring is
`calibrate`'s work, writing `checkpoint.fp8_source`'s.
"""

from pathlib import Path

from halfbyte.calibrate.draw import RowPictures
from halfbyte.calibrate.seeing import check_pictures
from halfbyte.calibrate.stream import Progress, input_maxima
from halfbyte.calibrate.tokens import builtin_rows, check_rows, read_rows
from halfbyte.checkpoint.fp8_source import check_source, write_fp8_source
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.writer import check_target

# Static scales need the largest magnitudes only; a few thousand tokens of mixed text show them.
BUILTIN_SAMPLES = 16
BUILTIN_TOKENS_PER_SAMPLE = 256


def make_fp8_source(
    source: Path,
    target: Path,
    *,
    calibration_tokens: Path | None = None,
    on_layer: Progress | None = None,
) -> Path:
    """Write the FP8 dialect of the bf16 checkpoint `source` to `target`.

    calibration_tokens   safetensors with `batch{i}.input_ids`; None means 4,096 tokens at most of
                         the text in the package, in the checkpoint's own tokenizer
    on_layer             called with layers measured and layers in all

    Raises UsageError if the target exists, the source is quantized already or the tokens do not
    fit it; CheckpointError, FormatError for a damaged source.
    """
    check_target(target)
    checkpoint = Checkpoint.open(source)
    check_source(checkpoint)
    pictures: RowPictures = ()
    if calibration_tokens is None:
        rows = builtin_rows(
            source, samples=BUILTIN_SAMPLES, tokens_per_sample=BUILTIN_TOKENS_PER_SAMPLE
        )
    else:
        rows, pictures = read_rows(calibration_tokens)
    where = str(calibration_tokens or "the builtin text")
    check_rows(rows, checkpoint.config.text, where)
    check_pictures(rows, pictures, checkpoint.config, where)
    maxima = input_maxima(checkpoint, rows, on_layer=on_layer, pictures=pictures)
    return write_fp8_source(checkpoint, maxima, target)
