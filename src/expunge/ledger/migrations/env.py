"""What Alembic runs: the migrations, on the connection that it was handed, within its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
