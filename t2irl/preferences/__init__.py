"""Human preferences: pairs made blind from evaluations, a page to judge them on, votes, statistics, formats, a reward."""
