"""`python -m pusht_act`, the same as `pusht-act`."""

from pusht_act.main import command

command()
