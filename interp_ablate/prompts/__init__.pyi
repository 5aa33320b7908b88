from .chat_format import ChatFormat as ChatFormat
from .chat_template import render as render
from .contrast_set import ContrastSet as ContrastSet
from .contrast_set import Split as Split
from .linting import LintReport as LintReport
from .linting import lint as lint
from .prompt import Prompt as Prompt
from .prompt import PromptLike as PromptLike
