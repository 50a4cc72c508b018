from rkl.flows.training import Moment as Moment
from rkl.flows.training import Training as Training
from rkl.flows.training import train as train
