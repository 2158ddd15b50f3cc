"""The trainer: `python -m edge_rag.learning.trainer FOLDER`, a program of its own, and the only importer of torch.

It reads a job folder (`learning.job`), is spoken to on its standard input (`trainer.control`) and says what it does on
its standard output (`learning.events`). One LoRA is distilled from the examples: the base computes the contexts, the
adapter acts from the question on (late activation), and learns the teacher's distributions and words.

    program    before torch is loaded: one trainer a job, errors as events
    work       prepares, trains, exports: the order of things
    device     where it is computed, whether that computes rightly, and how much memory it has
    sizes      what will fit: refuses before anything is loaded
    base       the model that serves, as transformers has it
    lora       what is adapted
    batches    which examples are computed together        contexts   the contexts' KV, computed once
    loss       what is minimised                           loop       the steps
    checkpoint where it goes on                            export, proof   what it leaves behind
"""
