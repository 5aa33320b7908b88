from .plan_to_weights import TensorEdit as TensorEdit
from .plan_to_weights import WeightPlan as WeightPlan
from .plan_to_weights import edited_state_dict as edited_state_dict
from .plan_to_weights import weight_plan as weight_plan
from .weight_form import writers_only_form as writers_only_form
