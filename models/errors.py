"""The refusals of this room, in one small tree, each message saying what to do."""


class ModelError(ValueError):
    """A model, an image or a file cannot be used as given."""


class ImageError(ModelError):
    """An image file cannot be used: replace it, or choose another fit."""


class CheckpointError(ModelError):
    """A checkpoint cannot be used as given."""


class CheckpointFormatError(CheckpointError):
    """The file is no safetensors or state-dict file, is cut short, or its sizes do not add up: write it again."""


class UnsafeCheckpointError(CheckpointError):
    """The file carries code or an archive trick; it was not run: save plain tensors instead."""


class ManifestError(CheckpointError):
    """The manifest is missing, malformed, or of an unknown version: convert the file again."""


class UnknownFamilyError(CheckpointError):
    """The model family is not one that this version knows."""


class WrongKindError(CheckpointError):
    """The checkpoint holds a model of a known family, of another kind than is needed here."""


class ArchitectureError(CheckpointError):
    """The architecture is out of range or does not fit the image size."""


class TensorMismatchError(CheckpointError):
    """Tensor names, shapes or dtypes are not those of the architecture."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity: the training that wrote it diverged."""


class UnusableModelError(CheckpointError):
    """The weights load, but the model that they make cannot be used by any job: use an earlier checkpoint."""


class DigestError(CheckpointError):
    """The tensors are not the ones the manifest was written for."""


class MissingFactError(CheckpointError):
    """The file does not tell something that only its owner knows: state it and send the file again."""


class PromptError(ModelError):
    """The text encoder cannot read the prompt: it is empty, or longer than the model's context, and would be cut."""
