"""What each kind of component gets where its author wrote nothing: one module for each."""
