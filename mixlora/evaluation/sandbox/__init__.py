from mixlora.evaluation.sandbox.problem import Problem, from_humaneval, from_mbpp, from_row
from mixlora.evaluation.sandbox.sandbox import Sandbox, Verdict, require
from mixlora.evaluation.sandbox.scores import mean_pass_at_k, pass_at_k
