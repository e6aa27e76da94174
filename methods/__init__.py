"""The techniques, in the order in which they are best read. A new one is a file beside this and a line here."""

from methods.full import Full
from methods.last_layer import LastLayer
from methods.bitfit import BitFit
from methods.lora import LoRA
from methods.adapter import Adapter
from methods.prompt import Prompt
from methods.prefix import Prefix
from methods.intrinsic import Intrinsic
from methods.mask import Mask
