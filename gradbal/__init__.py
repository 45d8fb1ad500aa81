"""gradbal balances the gradients of several losses: one call in place of `sum(losses).backward()`."""
