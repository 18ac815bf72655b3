"""`%diagnose` and `%%watch`, for IPython and Jupyter: `%load_ext labkit`."""

import ast
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import (
    Magics,
    cell_magic,
    line_magic,
    magics_class,
    output_can_be_silenced,
)
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from labkit.instruments.diagnosis import diagnose
from labkit.instruments.live import Sight, screen


def register(ipython: Any) -> None:
    """Adds the magics, and the completion of what stands behind `%diagnose`."""
    ipython.register_magics(LabkitMagics)
    ipython.set_hook("complete_command", _complete_diagnose, str_key="%diagnose")


def _complete_diagnose(ipython: Any, event: Any) -> list[str]:
    options = ["--seconds", "--batch-size", "--workers"] if event.symbol.startswith("-") else []
    return options or [name for name in ipython.user_ns if not name.startswith("_")]


@magics_class
class LabkitMagics(Magics):
    """See each one's help: `%diagnose?`, `%%watch?`."""

    @magic_arguments()
    @argument("factory", help="an iterator factory, as for labkit.QueueRunner")
    @argument("model", help="a compiled Keras model, a step, or the seconds that a step takes")
    @argument("--seconds", "-s", type=float, default=20.0, help="to spend (default: 20)")
    @argument("--batch-size", "-b", type=int, help="samples per step (default: the generator's)")
    @argument("--workers", "-w", help="only this kind: thread or process")
    @output_can_be_silenced
    @line_magic
    def diagnose(self, line: str) -> Any:
        """Am I input-bound? Which workers would cure it, and how many?

        Measures the generator, the model, and both together, and gives the report, as
        `labkit.diagnose` does. FACTORY and MODEL are names or expressions; in quotes, if they have
        spaces:

            %diagnose factory model
            report = %diagnose --seconds 10 "make_factory(1, 2)" 0.05
        """
        given = parse_argstring(self.diagnose, line)
        options = {"workers": given.workers} if given.workers else {}
        factory, model = (self._value(text) for text in (given.factory, given.model))
        return diagnose(factory, model, given.seconds, given.batch_size, **options)

    def _value(self, text: str) -> Any:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        text = text[1:-1] if quoted else text
        shell: Any = self.shell
        try:
            return shell.ev(text)
        except (NameError, SyntaxError) as error:
            raise UsageError(
                f"%diagnose: expected a name or an expression, got {text!r}: {error}. Put one that "
                "has spaces in quotes."
            ) from None

    @magic_arguments()
    @argument("--interval", "-i", type=float, default=0.1, help="of samples, in s (default: 0.1)")
    @output_can_be_silenced
    @cell_magic
    def watch(self, line: str, cell: str) -> Any:
        """Runs the cell, and shows CPU, memory, each GPU, the queue and the waiting during it.

        The queue is that of a labkit.QueueRunner which runs in the cell. Waiting is that of each
        Keras `fit`, if TensorFlow was imported before, of labkit.watch(batches), and of StepTimer;
        what was not there is not drawn. In a terminal it is a line of text.
        """
        given = parse_argstring(self.watch, line)
        try:
            sight = Sight(given.interval)
        except ValueError as error:
            raise UsageError(f"%%watch: {error}") from None
        try:
            with sight:
                return self._run(cell)
        finally:
            screen().show(sight, ended=True)

    def _run(self, cell: str) -> Any:
        """The value of the cell's last expression; errors show the cell's own lines."""
        shell: Any = self.shell
        text = shell.transform_cell(cell)
        name = shell.compile.cache(text, shell.execution_count, raw_code=cell)
        tree = shell.transform_ast(shell.compile.ast_parse(text, name))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(shell.compile(tree, name, "exec"), shell.user_ns)
        if last is None:
            return None
        return eval(shell.compile(ast.Expression(last.value), name, "eval"), shell.user_ns)
