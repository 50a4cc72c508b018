"""How the tests hold functions to their signatures: shapes by jaxtyping, types by beartype."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as pyright has it
