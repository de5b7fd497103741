"""
Training and evaluation of a student.

inputs       what a run starts from: batches, student, teacher
learner      the student as it learns: model, optimizer and one step
measures     sklformat eval, and what a run measures while it trains
objective    a student with its loss, as one module
parallelism  one student on several processes, replicated or divided
processes    which of the processes that train together this is, and who wants it to stop
runs         the directory of a training run: lock, settings, checkpoints, log
schedule     the learning rate of each step
streams      endless batches, from a cache or from packed text
trackers     what a run tells while it goes: log, trackers, stderr, its speed
training     sklformat train: the training loop
validation   a student on held-out sequences of a cache: LM loss, KL to the records and to the teacher
"""
