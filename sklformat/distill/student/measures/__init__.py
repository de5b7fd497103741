"""
What eval and training measure: a student on text or records that it did not learn from.

advice      how few records are enough, by the noise that they add
evaluation  sklformat eval: how good a student is, and how close to its teacher
milestones  what a run measures while it trains, and the best student so far
noise       what drawn records add to the noise of a student's gradient
origins     what a student learnt from, as its run says
passages    what it is measured on: text, or part of a cache
showing     what a page shows beside a cache: text of tokens, and what a student says of them
"""
