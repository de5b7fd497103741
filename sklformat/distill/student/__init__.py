"""
Training and evaluation of a student.

inputs       what a run starts from: batches, student, teacher
learner      the student as it learns: model, optimizer and one step
measures     sklformat eval, and what it measures on
objective    a student with its loss, as one module
parallelism  one student on several processes, replicated or divided
processes    which of the processes that train together this is
runs         the directory of a training run: lock, settings, checkpoint, log
schedule     the learning rate of each step
streams      endless batches, from a cache or from packed text
training     sklformat train: the training loop
validation   a student on held-out sequences of a cache: LM loss, KL to the records and to the teacher
"""
