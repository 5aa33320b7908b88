from .chat_reader import read_preferences as read_preferences
from .chat_reader import read_samples as read_samples
from .conversations import Preference as Preference
from .conversations import Sample as Sample
from .filter_recipe import FilterRecipe as FilterRecipe
from .filtering import filter_file as filter_file
from .screening import screen_file as screen_file
