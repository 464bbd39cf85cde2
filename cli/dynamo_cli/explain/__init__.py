"""What `dynamo explain` is made of: where the pickers are (`pickers`), what they decided as
sentences (`words`), and how that looks on a terminal (`show`); and of `dynamo planner
explain` (`planner`)."""
