from .directions import cosine_similarity as cosine_similarity
from .directions import projections as projections
from .directions import separation_by_layer as separation_by_layer
from .test_rates import before_after as before_after
from .trials import pareto as pareto
from .trials import search_front as search_front
from .trials import sweep_heatmap as sweep_heatmap
