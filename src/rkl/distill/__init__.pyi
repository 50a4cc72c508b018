from rkl.distill.heads import Head as Head
from rkl.distill.heads import read_head as read_head
from rkl.distill.teachers import Teacher as Teacher
from rkl.distill.teachers import load_model as load_model
from rkl.distill.teachers import load_tokenizer as load_tokenizer
from rkl.distill.trainer import DistillConfig as DistillConfig
from rkl.distill.trainer import DistillTrainer as DistillTrainer
from rkl.distill.batches import PadRows as PadRows
