"""The command lines of the trainers this one comes from, read as they are.

Two projects named CogVideoX Factory came before: mindone's for MindSpore, and the PyTorch one it was made of. Their
four trainers, prepare_dataset and infer share most flags. Here one table (`training`, `preparation`, `inference`) says
of each flag of either which setting it is, why it has no effect, or what to do in its place; `translate` turns a
command line into settings, and the command then runs as if these had been typed.

`cogvideox_text_to_video_sft.py` and its neighbours are their scripts by name: `python -m
cogvideox_factory.original.cogvideox_text_to_video_sft` with the flags of old.
"""
