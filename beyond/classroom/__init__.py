"""For students and teachers: a checker that names mistakes, a starter, a submission, a tour."""
