"""One method per file. `QUANTIZERS` is the table that configurations choose from."""

from turboquant_hf.quantizers.base import Field, Quantizer
from turboquant_hf.quantizers.conditioned import Conditioned
from turboquant_hf.quantizers.kivi import KIVI
from turboquant_hf.quantizers.lossless import Lossless
from turboquant_hf.quantizers.mse import MSE
from turboquant_hf.quantizers.outlier import Outlier
from turboquant_hf.quantizers.polar import Polar
from turboquant_hf.quantizers.prod import Prod
from turboquant_hf.quantizers.qjl import QJL
from turboquant_hf.quantizers.uniform import Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    quantizer.name: quantizer
    for quantizer in (
        Conditioned,
        KIVI,
        Lossless,
        MSE,
        Outlier,
        Polar,
        Prod,
        QJL,
        Uniform,
    )
}

__all__ = ["QUANTIZERS", "Field", "Quantizer"]
