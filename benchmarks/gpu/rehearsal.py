"""What a run on tiny shapes without a GPU is marked with. Apart, because not everything needs torch."""

REHEARSAL = "CPU rehearsal: no figure here means anything"
