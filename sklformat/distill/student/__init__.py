"""
Training and evaluation of a student.

evaluation  sklformat eval: how good a student is, and how close to its teacher
inputs      what a run starts from: batches, student, teacher
learner     the student as it learns: model, optimizer and one step
objective   a student with its loss, as one module
origins     what a student learnt from, as its run says
parallelism one student on several processes, replicated or divided
passages    what eval measures on: text, or part of a cache
processes   which of the processes that train together this is
runs        the directory of a training run: lock, settings, checkpoint, log
schedule    the learning rate of each step
streams     endless batches, from a cache or from packed text
training    sklformat train: the training loop
validation  a student on held-out sequences of a cache: LM loss, KL to the records and to the teacher
"""
